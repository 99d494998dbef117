"""What runs again and again on buffers that stay where they are: recorded once a shape, and kept with its network.

Shared by a captured step (:mod:`.capture`) and a captured call (:mod:`.call`). On CUDA a recording is a graph that is
replayed, elsewhere or compiled the function is called again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...core.errors import BadInput, Note
from .network import Optimised
from .snapshot import Snapshot, strangers

Mode = Literal["auto", "eager", "graph", "compile", "compile+graph"]

AT_MOST = 4
"""Recordings kept for a network, one per shape; the oldest goes."""
WARM_UPS = 3
"""Runs before a capture, in which libraries choose their kernels and take their memory."""


class Recorded:
    """A function of buffers, run once and ready to be run again.

    Args:
        body: takes nothing and reads its buffers.
        module: what it runs, which is asked before every run whether it still is the same.
    """

    def __init__(
        self, body: Callable[[], Any], module: nn.Module, device: torch.device, mode: Mode, compiler: dict[str, Any]
    ) -> None:
        self.body = body
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs = self._run()  # and what is kept is kept
        if mode.startswith("compile"):
            self.body = torch.compile(_with_own_code(body), **compiler)
            self.outputs = self._run()
        if mode.endswith("graph") and device.type == "cuda":
            self._capture(device)
        self.snapshot = Snapshot(module)

    def __call__(self) -> Any:
        """What the body gives, in memory of its own: the next replay writes over the outputs."""
        if self.graph is None:
            self.outputs = self._run()
        else:
            self.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self.outputs)

    def _run(self) -> Any:
        with torch.no_grad():
            return self.body()

    def _capture(self, device: torch.device) -> None:
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
            self.outputs = self._run()
        self.graph = graph


def _with_own_code(body: Callable[[], Any]) -> Callable[[], Any]:
    """The same, with code of its own: torch.compile counts by it, and gives up after eight of one."""

    def run() -> Any:
        return body()

    return FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)


class Piece(Protocol):
    """Buffers and what is recorded on them."""

    recorded: Recorded


P = TypeVar("P", bound=Piece)


class Recorder:
    """Makes pieces where it can, says once why where it cannot.

    Args:
        what: is captured, "step" or "call", and ``otherwise`` how it runs if it is not.
        mode, compiler: see :func:`~unrolled.kernels.fast.capture.captured`.

    Attributes:
        seconds: what making the pieces took, the first call's cost beside the call itself.
    """

    def __init__(self, what: str, otherwise: str, mode: Mode, compiler: dict[str, Any] | None) -> None:
        if mode not in get_args(Mode):
            raise BadInput(f"There is no mode {mode!r} of capturing: use {', '.join(get_args(Mode))}.")
        self.what, self.otherwise, self.mode, self.compiler = what, otherwise, mode, compiler or {}
        self.seconds = 0.0
        self._said, self._failed = set[str](), set[tuple[Any, ...]]()

    @property
    def records(self) -> bool:
        """Whether the mode is one that records anything; "auto" is none until somebody has measured what wins."""
        return self.mode not in ("auto", "eager")

    def piece(self, made: Optimised | None, module: nn.Module, key: tuple[Any, ...], make: Callable[[], P]) -> P | None:
        """The piece of that key, made if there is none or the module has changed; None if nothing is to be captured."""
        if not self.records or made is None:
            return None
        if torch.is_grad_enabled():
            self.say(f"gradients may be wanted: the {self.what} {self.otherwise}, unless under torch.no_grad()")
            return None
        key = (self.mode, repr(self.compiler), *key)
        piece: P | None = made.pieces.get(key)
        if piece is not None and piece.recorded.snapshot.holds():
            return piece
        if key in self._failed:
            return None
        if why := strangers(module, made.shared):
            self.say(f"{why}: the {self.what} {self.otherwise}, and is not captured")
            return None
        made.pieces.pop(key, None)
        while len(made.pieces) >= AT_MOST:
            made.pieces.pop(next(iter(made.pieces)))
        began = time.perf_counter()
        try:
            # In inference mode too: buffers are written to later, and their versions asked for.
            with torch.inference_mode(False), torch.no_grad():
                made.pieces[key] = piece = make()
        except RuntimeError as error:  # of CUDA's capture, or of memory: it would be the same at the next step
            self._failed.add(key)
            self.say(f"the {self.what} could not be captured ({str(error).splitlines()[0]}), and {self.otherwise}")
            return None
        self.seconds += time.perf_counter() - began
        return piece

    def say(self, sentence: str) -> None:
        """A Note, once."""
        if sentence not in self._said:
            self._said.add(sentence)
            warnings.warn(f"{sentence[0].upper()}{sentence[1:]}.", Note, stacklevel=5)
