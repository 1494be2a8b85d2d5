"""A run with tasks and a mix of texts: retentions from the items, overlaps, domains, all of it on the page."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml
from texts import write_jsonl
from world import WORDS, write_model, write_recipe, write_texts

from layerscalpel.cli import main
from layerscalpel.items import load_items
from layerscalpel.retention import retentions

pytest.importorskip("lm_eval", reason="needs the extra eval")
SEEN, ITEMS = 5, 8


def write_task(folder: Path) -> tuple[Path, list[str]]:
    """Write a task of long questions; return its definition and the questions."""
    draw = random.Random(3)
    asked = [" ".join(draw.choices(WORDS, k=20)) for _ in range(ITEMS)]
    rows = [{"q": text, "options": ["home", "dusk"], "gold": i % 2} for i, text in enumerate(asked)]
    data = write_jsonl(folder / "mill.jsonl", rows)
    definition = {
        "task": "mill",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "gold",
        "doc_to_choice": "options",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "mill.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    return folder / "mill.yaml", asked


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    task, asked = write_task(folder)
    texts = write_texts(folder / "texts.jsonl")
    healing = write_texts(folder / "healing.jsonl", count=20, seed=9)
    seen = [json.dumps({"text": f"it was told that {text.upper()}!"}) for text in asked[:SEEN]]
    healing.write_text("\n".join([healing.read_text(encoding="utf-8"), *seen]), encoding="utf-8")
    other = write_texts(folder / "other.jsonl", seed=5)
    changes = {"data__healing": str(healing), "data__healing_blocks": None, "data__evaluation": f"{texts}=3,{other}=1"}
    recipe = write_recipe(folder / "recipe.yaml", texts, evaluate__long_blocks=0, benchmark__enabled=False, **changes)
    model = write_model(folder / "model")
    given = ["--recipe", str(recipe), "--out", str(folder / "out"), "--tasks", str(task), "--search", "last"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerscalpel.report._figures", lambda results: {})
        assert main(["run", str(model), *given, "--no-verify", "--quiet"]) == 0
    return folder / "out"


def evaluated(run: Path) -> dict:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["evaluate"]


def test_retentions_are_those_of_the_kept_items(run):
    items = {name: load_items(run / "evaluate", name) for name in ("parent", "cut", "healed")}
    for name in ("cut", "healed"):
        assert evaluated(run)[name]["retention"] == retentions(items["parent"], items[name]).to_dict()
    assert "retention" not in evaluated(run)["parent"]


def test_items_that_healed_the_model_are_counted(run):
    assert evaluated(run)["overlap"] == {"mill": {"num_items": ITEMS, "overlapping": SEEN, "too_short": 0}}
    page = " ".join((run / "report.html").read_text(encoding="utf-8").split())
    assert f"{SEEN} of {ITEMS} items of mill share 13 words in a row with it." in page


def test_each_domain_has_its_figures(run):
    for name in ("parent", "cut", "healed"):
        domains = evaluated(run)[name]["by_domain"]
        assert [row["num_blocks"] for row in domains.values()] == [3, 1]
        assert {Path(domain).name for domain in domains} == {"texts.jsonl", "other.jsonl"}
        assert all(("kl_nats" in row) == (name != "parent") for row in domains.values())


def test_every_model_wrote_on_the_prompts_that_fit(run):
    for name in ("parent", "cut", "healed"):
        found = evaluated(run)[name]
        assert len(found["samples"]) == found["writing"]["num_prompts"] > 1
        assert {"kind", "prompt", "text", "cut_off", "loops", "sampled"} == set(found["samples"][0])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(f'<section id="{name}">' in page for name in ("tasks", "where", "samples"))
