"""Tensors on their way between host and device, while the device goes on computing.

A copy from ordinary memory waits for all work that is queued on the device, and so does every count of what a mask
holds. So blocks are counted on the host and leave it page-locked; results leave the device by a stream of their own.

Dimensions: B blocks, T tokens, D hidden size, M labelled places.

    sent = Sent.to(device, tokens_BT, labelled_BT, None)
    fetch = Departures(device).begin({"prefix": hidden})
    fetch()["prefix"]  # in host memory; call it in another thread
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sent:
    """Blocks on the device."""

    tokens_BT: Tensor
    positions_BT: Tensor | None
    """Of each token in its document, where packed documents are kept apart."""
    places_M: Tensor
    """Of the hidden states [B * T, D], one block below the other, that predict a labelled token."""
    targets_M: Tensor
    """What they predict."""

    @classmethod
    def to(cls, device: torch.device, tokens_BT: Tensor, labelled_BT: Tensor, positions_BT: Tensor | None) -> Sent:
        """Send blocks from host memory."""
        before_BT = torch.zeros_like(labelled_BT)
        before_BT[:, :-1] = labelled_BT[:, 1:]
        places_M = before_BT.flatten().nonzero()[:, 0]
        return cls(
            tokens_BT=_to_device(tokens_BT, device),
            positions_BT=None if positions_BT is None else _to_device(positions_BT, device),
            places_M=_to_device(places_M, device),
            targets_M=_to_device(tokens_BT.flatten()[places_M + 1], device),
        )


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Departures:
    """The way by which results leave a device."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, rows: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
        """Return what gives results, whose computation is queued by now, in host memory once they are there."""
        stream = self.stream
        if stream is None:
            return lambda: rows
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(stream.device))

        def fetch() -> Mapping[str, Tensor]:
            with torch.cuda.stream(stream):
                computed.wait(stream)
                found = {name: torch.empty_like(part, device="cpu", pin_memory=True) for name, part in rows.items()}
                for name, part in rows.items():
                    found[name].copy_(part, non_blocking=True)
            stream.synchronize()
            return found

        return fetch
