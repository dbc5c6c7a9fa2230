"""What a recording does at each forward, backward and step of its user's loop."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.audit import coarsest, is_due
from ..capture.guard import UseGuard, watch
from ..capture.hooks import Capture
from ..capture.ladder import AttributionError
from ..capture.layer import Layer
from ..capture.recorders import Compression
from ..capture.samples import Samples
from ..capture.targets import Target
from ..workload import tensors
from .balance import Balance
from .checks import check_failed, in_scaler, outputs_in
from .forward import Proven, Prover, TrainingPass, look_of, modes_of
from .gathered import Gathered
from .run import Run
from .writing import Loop, Named, StepWriter


class Taking:
    """Hooks on a model and its optimizer, for the time of a recording."""

    def __init__(
        self,
        run: Run,
        loop: Loop,
        capture: Capture,
        targets: dict[str, Target],
        layers: dict[str, Layer],
        mixing: bool,
        forget: Callable[[set[str]], None],
    ) -> None:
        self.run, self.loop, self.capture, self.targets, self.layers = run, loop, capture, targets, layers
        self.model, self.optimizer = loop.model, loop.optimizer
        self._mixing, self._forget_layers = mixing, forget
        self._equip()
        self._named: Named | None = None  # whose forward is to come
        self._pending: list[Named] = []  # forwards since the last step
        self._looks: set[Any] = set()  # of forwards in which shared outputs were looked for
        self._proven: dict[Any, Proven] = {}  # by what tells forwards apart whose samples stay apart
        self._loose: set[Any] = set()  # paths of forwards whose samples may meet, or go where the data says
        self._asked: list[tuple[Any, Proven, TrainingPass, Any, Any]] = []  # forwards of which it is not known
        self._guard: UseGuard | None = None  # of the forward that runs
        self._modes: Any = None  # of the forward that runs
        self._forwards, self._warned = 0, False
        self._handles: list[Any] = []

    def __deepcopy__(self, _memo: Any) -> Taking:
        return self  # of a model that is copied while it is recorded: the hooks do nothing for the copy

    def begin(self) -> None:
        """Hook the model and the optimizer."""
        self._exits = contextlib.ExitStack()
        self._exits.enter_context(self.capture.attached())
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            self.optimizer.register_step_pre_hook(self._before_step),
        ]

    def end(self) -> None:
        """Take the hooks off, if they are on."""
        self._leave_guard()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.gathered.remove()
        self._exits.close()

    # What the user says of samples.

    def name(
        self,
        ids: list[str],
        cu_seqlens: Tensor | None,
        share: Sequence[float] | Tensor | float | None,
        labels: Sequence[float] | Tensor | float,
    ) -> None:
        if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens must be an int tensor [n + 1], got {type(cu_seqlens).__name__}")
        if not ids:
            raise ValueError("ids: it is empty; name each sample of the next forward")
        if cu_seqlens is not None and len(cu_seqlens) != len(ids) + 1:
            raise ValueError(
                f"cu_seqlens has {len(cu_seqlens)} bounds; of {len(ids)} samples it must have {len(ids) + 1}"
            )
        for what, value in (("share", share), ("labels", labels)):
            numbers = torch.as_tensor(1.0 if value is None else value, dtype=torch.float64).detach()
            if numbers.ndim > 1 or (numbers.ndim and len(numbers) != len(ids)):
                shape = list(numbers.shape)
                raise ValueError(f"{what} has shape {shape}; it must be one number for each of the {len(ids)} samples")
            if not bool((numbers.isfinite() & (numbers >= 0)).all()) or (what == "labels" and not bool(numbers.all())):
                raise ValueError(f"{what} has a number that is negative or not finite; it must be a weight, or a count")
        self._named = Named(ids, cu_seqlens, share, labels)

    def note_losses(self, losses: Tensor) -> None:
        last = self._last("losses")
        if losses.shape != (last.n,):
            raise ValueError(f"losses has shape {list(losses.shape)}; it must be [{last.n}], one for each sample")
        if not bool((losses.isfinite() & (losses >= 0)).all()):
            raise ValueError(
                "losses has a number that is negative or not finite; it must be each label's cross-entropy"
            )
        last.losses = losses.detach().float().cpu()

    def draw(self, loss: Tensor) -> None:
        last = self._last("drawn")
        assert last.current is not None
        current = last.current
        kept, current.recorder = current.recorder, Compression(self.layers)
        current.emitted.clear()
        try:
            torch.autograd.grad(loss, list(current.parameters), retain_graph=True, allow_unused=True)
            last.drawn = self._rows(last)
            if not current.emitted or not bool(last.drawn.isfinite().all()):
                raise ValueError(
                    "drawn: no gradient of this loss reaches the layers of the last forward, or it is not finite; make "
                    "it of what that forward returned"
                )
        finally:
            current.recorder = kept
            current.emitted.clear()

    def _last(self, what: str) -> Named:
        if not self._pending:
            raise RuntimeError(f"run.{what}: no forward was recorded since the last step; call it behind the forward")
        return self._pending[-1]

    def drop(self, target: Tensor, part: float) -> Tensor:
        if self.run.kind is None:
            raise ValueError(f"run.drop: how an optimizer uses a gradient must be known: {self.run.rows_alone}")
        last = self._last("drop")
        if last.current is None or not last.current.emitted:
            raise RuntimeError("run.drop: nothing was backpropagated since the forward; call it behind loss.backward()")
        values = self._rows(last).double().cpu() @ (target * self.writer.direct())  # how much each lowers the loss
        worst = values.argsort()[: int(part * last.n)]
        self._pending.remove(last)
        return worst[values[worst] < 0]

    # The forward.

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self.model:
            return
        self._leave_guard()
        self.capture._pass = None
        named = self._named if torch.is_grad_enabled() else None
        if named is None:
            return
        self._named = None
        self._check_trained()
        self._drop_forgotten()
        self.gathered.settle()
        samples = Samples(named.n, named.cu_seqlens)
        self._forwards += 1
        self._modes = modes_of(model)
        look = look_of(args, kwargs, named.n), self._modes
        if look not in self._looks:
            shared = self.prover.discover(args, kwargs, samples)
            if shared:
                self._leave_out(shared)
            self._looks.add(look)
        named.current = self.prover.new_pass(samples)
        named.current.place = self._forwards
        self._pending.append(named)
        self.capture.begin(named.current)
        parameters = [target.tensor for target in self.targets.values()]
        flags = {id(p): p.requires_grad for p in model.parameters()}
        self._guard = watch(self.capture, parameters, named.n, None, tensors((args, kwargs)), flags)
        self._guard.__enter__()

    def _drop_forgotten(self) -> None:
        """Forget backwards whose gradients were thrown away before those behind them."""
        if self.gathered.was_reset:
            self._pending = [named for named in self._pending if not named.settled]
        self.gathered.was_reset = False
        for named in self._pending:
            named.settled = named.current is not None and bool(named.current.emitted)

    def _check_trained(self) -> None:
        """Raise ValueError where a layer is not trained any more, or its gradient is changed by a hook."""
        for name, target in self.targets.items():
            if not target.tensor.requires_grad:
                raise ValueError(
                    f"layer {name}: it was frozen while it is recorded (requires_grad); end the recording, and begin "
                    "another with a new folder"
                )
            if target.tensor._backward_hooks:
                raise ValueError(
                    f"layer {name}: its parameter has hooks on its gradient, which a proof would run too often; change "
                    "gradients between backward and optimizer.step()"
                )

    def _leave_guard(self) -> UseGuard | None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.__exit__(None, None, None)
            self.capture.changed.clear()  # what the user's own forward renormalises, stays
        return guard

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        guard = self._leave_guard() if model is self.model else None
        if guard is None:
            return
        named = self._pending[-1]
        current = named.current
        assert current is not None
        if out is None:  # it raised an error, or returns nothing
            self._pending.pop()
            self.capture._pass = None
            return
        check_failed(current)
        movement = guard.movement
        movement.end(tuple(outputs_in(out)))  # type: ignore[arg-type]
        current.dtypes |= guard.dtypes
        path = None if guard.unforeseen else movement.fingerprint()
        shapes = tuple(x.shape for x in tensors((args, kwargs)))
        cu = None if named.cu_seqlens is None else tuple(named.cu_seqlens.tolist())
        alike = path, movement.sizes, named.n, shapes, cu, self._modes
        known = self._proven.get(alike) if path is not None else None
        if known is None or known.blank or is_due(self._forwards):
            found = self.prover.look(current, out)
            if known is not None:
                self._proven[alike] = found
            elif path is None or path in self._loose:
                self._warn_slow()
            else:  # asked once the backward is over: another forward may write to buffers that it needs
                self._asked.append((alike, found, current, args, kwargs))
            known = found
        known.lend(current)
        current.open_to_user(Compression(self.layers))

    def _settle(self) -> None:
        """Find out of forwards that were proven whether all that run the same ops are."""
        for alike, found, current, args, kwargs in self._asked:
            if alike in self._proven:
                continue
            if alike[0] not in self._loose and self.prover.stays_apart(current, args, kwargs):
                self._proven[alike] = found
            else:
                self._loose.add(alike[0])
                self._warn_slow()
        self._asked.clear()

    def _leave_out(self, names: set[str]) -> None:
        """Forget layers before the first step; raise AttributionError behind it."""
        first = next(name for name in self.layers if name in names)
        if len(self.run._files[self.loop.world.rank]):
            raise AttributionError(
                f"layer {first}: its output is now one for all samples, as a table of positions is, and no row is a "
                "sample's; leave it out with layers= from the first step on"
            )
        if names == set(self.layers):
            raise AttributionError(f"layer {first}: its output is one for all samples, and no other layer is recorded")
        self.gathered.remove()
        for name in names:
            del self.layers[name], self.targets[name]
        for use in self.capture.uses.values():
            use.weight = None if use.weight is not None and use.weight.name in names else use.weight
            use.bias = None if use.bias is not None and use.bias.name in names else use.bias
        self.capture.refresh()
        self._forget_layers(names)
        self._equip()

    def _equip(self) -> None:
        """Make what depends on which layers are recorded."""
        parameters = {name: target.tensor for name, target in self.targets.items()}
        self.prover = Prover(self.model, self.capture, self.layers, parameters, self._mixing)
        self.gathered = Gathered(self.targets, self.layers)
        self.balance = Balance(self.layers, self.run.columns.widths)
        self.writer = StepWriter(self.run, self.loop, self.targets, self.gathered)

    def _warn_slow(self) -> None:
        """Say once that forwards are proven one by one."""
        if not self._warned:
            warnings.warn(
                "model: nothing shows that its samples stay apart whatever their data are, so each forward's rows are "
                "proven by themselves, which takes two backwards more",
                stacklevel=2,
            )
        self._warned = True

    # The step.

    def _rows(self, named: Named) -> Tensor:
        """Return the rows [n, K] of a forward, as its backward gave them."""
        assert named.current is not None
        current = named.current
        check_failed(current)
        current.check_proven()
        zeros = torch.zeros(named.n, device=next(iter(self.targets.values())).tensor.device)
        found = current.recorder.finish(self.layers, zeros)
        return torch.cat([found[name].flatten(1) for name in self.layers], 1)

    def _before_step(self, _optimizer: Any, args: Any, kwargs: Any) -> None:
        self.capture._pass = None
        self._drop_forgotten()
        if any(callable(x) for x in args[1:]) or kwargs.get("closure") is not None:
            raise ValueError(
                "run: optimizer.step(closure) runs forwards between its updates; call loss.backward() before, and "
                "optimizer.step() without a closure"
            )
        if float(getattr(self.optimizer, "found_inf", None) or 0) > 0:  # a fused optimizer skips its step by itself
            self._forget()
            return
        self.writer.check_optimizer()
        given = [named for named in self._pending if named.current is not None and named.current.emitted]
        if not given:
            why = "no forward was named by run.samples(ids)" if not self._pending else "nothing was backpropagated"
            raise RuntimeError(
                f"run: the optimizer makes a step, and since the last one {why}; call run.samples(ids) before each "
                "forward, loss.backward() behind it, and optimizer.step() once"
            )
        scale = self._scale()
        rows, before = [self._rows(named) for named in given], self.gathered.joined(self.gathered.before)
        dtypes = {d for named in given if named.current is not None for d in named.current.dtypes}
        begin = self.balance.begin(rows, before, coarsest(dtypes | {before.dtype}))
        rows, given = rows[begin:], given[begin:]
        after, fused = self.gathered.joined(self.gathered.after), getattr(self.optimizer, "grad_scale", None)
        clipped = self.balance.clipped(self.loop.mean(before), after, scale if fused is None else 1.0)
        norm = 0.0
        if 0 < clipped < 1:
            every = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
            norm = self.balance.check_norm([g for g in every if g is not None]) / clipped
            norm = norm if fused is None else norm / float(fused)
        if scale != 1:
            rows = [x / scale for x in rows]
            for named in given:
                named.drawn = None if named.drawn is None else named.drawn / scale
        gradient = after if fused is None else after / float(fused)  # which the optimizer divides by itself
        self.writer.append(given, [x / self.loop.world.ranks for x in rows], gradient, clipped, norm)
        self._forget()

    def _forget(self) -> None:
        """Forget the forwards and gradients since the last step."""
        self._settle()
        self._pending.clear()
        self.gathered.clear()

    def _scale(self) -> float:
        if self.loop.scaler is not None:
            return float(self.loop.scaler.get_scale())
        if in_scaler() or getattr(self.optimizer, "grad_scale", None) is not None:  # a fused one takes it itself
            raise ValueError("scaler: a GradScaler makes the step; pass it: dropinf.record(..., scaler=scaler)")
        return 1.0
