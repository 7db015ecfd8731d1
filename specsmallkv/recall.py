"""Recall begun while the draft is still writing: what its first row asks for leaves the host store early.

On a GPU the host's gather and the copy over the bus run beside the drafting steps, on a thread and a stream of their
own; what the finished block asks for besides moves when it is known (`TieredLayer.retain`). The set is the same.
Where host and device are one memory there is nothing to gain, and nothing happens.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from .ranking import largest
from .slots import Arrived, select_both, sent_over
from .tiered_layer import TieredLayer

AHEAD_SHARE = 0.5  # of the kept tokens, how many are sent ahead; .23 to .33 of a set are new each round

_worker = ThreadPoolExecutor(1, "recall")


@dataclass
class Shipment:
    """Parts of the store on their way, (B, H_kv, m, D), and the event after which they are there (None: they are)."""

    parts: tuple[Tensor, ...]
    sent: torch.cuda.Event | None

    def arrive(self) -> None:
        """Later work of the current stream finds them; their memory is not reused before."""
        if self.sent is not None:
            stream = torch.cuda.current_stream(self.parts[0].device)
            stream.wait_event(self.sent)
            for part in self.parts:
                part.record_stream(stream)


def recall_ahead(layers: list[TieredLayer], saliency: Tensor, share: float = AHEAD_SHARE) -> None:
    """Send ahead what ranks highest of each layer's evicted tokens; saliency (L, H_kv, N), N >= every tail's start.

    share: how many are sent, of the kept tokens.
    """
    away = [(index, layer) for index, layer in enumerate(layers) if layer.shares_memory is False]
    positions = [_best_evicted(layer, saliency[index].to(layer.k.device), share) for index, layer in away]
    if not any(own.numel() for own in positions):
        return
    on_host = torch.cat([own.flatten().cpu() for own in positions])  # one layer's wait is all layers'
    for (_, layer), own, host in zip(away, positions, on_host.split([x.numel() for x in positions]), strict=True):
        job = partial(_send, layer.store, host.view(own.shape), layer.k.device)
        beside = layer.k.device.type == "cuda"  # elsewhere a copy is not asynchronous
        layer.send(own, partial(_received, own, _worker.submit(job).result if beside else job))


def _best_evicted(layer: TieredLayer, saliency: Tensor, share: float) -> Tensor:
    """(1, H_kv, m) positions, sorted, of the host store's tokens that are not resident."""
    kept = layer.kept_positions[0]
    ranked = saliency[:, : layer.tail_start].scatter(-1, kept, -torch.inf)
    count = min(int(share * kept.shape[1]), layer.tail_start - kept.shape[1])
    return largest(ranked, max(count, 0)).unsqueeze(0)


def _send(store: tuple[Tensor, ...], positions: Tensor, device: torch.device) -> Shipment:
    """On the worker: gather in host memory, then copy; on CUDA from pinned memory on a stream of its own."""
    rows = select_both(store, positions)
    if device.type != "cuda":
        return Shipment(tuple(sent_over(part, device) for part in rows), None)
    stream, sent = _stream(device), torch.cuda.Event()
    with torch.cuda.stream(stream):
        parts = tuple(sent_over(part, device) for part in rows)
        sent.record(stream)
    return Shipment(parts, sent)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _received(positions: Tensor, result: Callable[[], Shipment]) -> Arrived:
    shipment = result()
    shipment.arrive()
    return Arrived(positions, shipment.parts)
