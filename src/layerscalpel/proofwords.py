"""What was compared to prove a cut, in sentences: each says how close it came, and what was left out.

proof_text(results["cut"])  # "Proven (fresh process). The saved cut checkpoint was loaded again ..."
"""

from __future__ import annotations

from typing import Any

Proof = dict[str, Any] | None


def proofs_of(cut: dict[str, Any]) -> list[Proof]:
    """Return the proof of every step of a cut, in order; None for a step without one."""
    return [step.get("proof") for step in cut.get("steps", [cut])]


def proof_text(cut: dict[str, Any]) -> str:
    """Say what was compared, of each step where segments were cut one after the other."""
    proofs = proofs_of(cut)
    if len(proofs) == 1:
        return proof_sentence(proofs[0])
    told = [f"Step {number}: {proof_sentence(proof)}" for number, proof in enumerate(proofs, start=1)]
    return " ".join([f"Cut in {len(proofs)} steps, the last run of layers first.", *told])


def proof_warnings(cut: dict[str, Any]) -> list[str]:
    """Return what a proof did not show, one sentence each; equal ones once."""
    found = []
    for proof in proofs_of(cut):
        if not is_proven(proof):
            found.append(proof_sentence(proof))
        elif proof and not proof["logits"]:
            reason = proof["left_out"].get("logits", "no reason was kept")
            found.append(f"The checkpoint's own logits were not compared: {reason}.")
    return list(dict.fromkeys(found))


def is_proven(proof: Proof) -> bool:
    """Tell whether the saved checkpoint was shown to compute what it should."""
    if not proof:
        return False
    parts = [proof[name] for name in ("logits", "twin") if proof[name]]
    enough = proof["logits"] or (proof["twin"] and proof["tensors"])
    return bool(enough) and all(_passed(part) for part in parts)


def _passed(part: dict[str, Any]) -> bool:
    close = part["logits_equal"] or 0 < part["max_difference"] <= part["tolerance"]
    return close and part["generation_equal"] is not False


def proof_sentence(proof: Proof) -> str:
    """Say what was compared and how close it came."""
    if not proof:
        return "The cut checkpoint was not verified (--no-verify)."
    said = [f"{'Proven' if is_proven(proof) else 'The proof FAILED'} ({proof['kind']})."]
    if part := proof["logits"]:
        said.append(_logits_sentence("The saved cut checkpoint", part))
    if part := proof["tensors"]:
        said.append(
            f"All {part['num_tensors']:,} kept tensors ({part['num_bytes'] / 1e6:,.1f} MB) have the bytes they have in"
            f" the parent (sha256 `{part['sha256'][:16]}`)."
        )
    if part := proof["twin"]:
        said.append(_logits_sentence("The same cut of a tiny random twin of the config", part))
    said += [f"Not part of the proof, {name}: {reason}." for name, reason in proof["left_out"].items()]
    if proof.get("text_only"):
        said.append("Compared on text alone; the parts for other inputs were carried over unchanged.")
    return " ".join(said)


def _logits_sentence(what: str, part: dict[str, Any]) -> str:
    differ = f"they differ by at most {part['max_difference']:.3g} where {part['tolerance']:.3g} is allowed"
    blocks, length = part["tokens"]
    generated = {
        None: "Nothing was generated from it.",
        True: "Greedy tokens with a cache are equal to those without.",
        False: "Greedy tokens with a cache are NOT those without.",
    }[part["generation_equal"]]
    return (
        f"{what} was loaded again ({part['loaded']}, {part['dtype']} on {part['device']}) and its logits on"
        f" {blocks} x {length} random tokens compared with those of the parent with the segment bypassed:"
        f" {'they are equal bit for bit' if part['logits_equal'] else differ}. {generated}"
    )
