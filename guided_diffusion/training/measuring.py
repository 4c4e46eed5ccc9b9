"""What a network keeps in memory between its forward and its backward pass, block by block, measured on itself.

Two kinds of pass, each over two and over three examples, so that what grows with the examples is told from what does not
(weights cast for use, gradients). The first runs forward only, with no block recomputing, and looks at every tensor that
autograd would keep; nothing is kept, so it needs little memory. The second is a whole pass with every block recomputing,
during which the bytes alive are followed from operation to operation. Both leave weights and gradients as they were.

A block is a module with the attribute `use_checkpoint` that holds no other such module.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..runtime import memory
from ..runtime.streams import TRAIN, Streams
from . import batching
from .checkpointing import Block, Line, Moment, Needs
from .parallel import unwrapped

if TYPE_CHECKING:
    from .trainer import Trainer

# Examples per measured pass, the first choice that the batch and the memory allow. One example alone is a special case to
# some kernels; if it is all there is, what it needs is taken to grow with the examples, which is on the safe side.
_SIZES = ((2, 3), (1, 2), (1,))


def blocks_of(net: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network that can recompute, by name."""
    found = {name: module for name, module in unwrapped(net).named_modules() if hasattr(module, "use_checkpoint")}
    return {
        name: module
        for name, module in found.items()
        if not any(inner is not module and hasattr(inner, "use_checkpoint") for inner in module.modules())
    }


def set_recomputing(net: nn.Module, names: Iterable[str]) -> None:
    """Let exactly the blocks of these names recompute in backward."""
    names = set(names)
    for name, block in blocks_of(net).items():
        block.use_checkpoint = name in names  # type: ignore[assignment]


def set_recomputing_norms(net: nn.Module, wanted: bool) -> bool:
    """Let all blocks recompute their norms in backward, or none. False where the network cannot."""
    inner: Any = unwrapped(net)
    if not hasattr(inner, "set_recompute_norms"):
        return False
    inner.set_recompute_norms(wanted)
    return True


def recompute(net: nn.Module, what: str) -> None:
    """Let the network recompute in backward, as --checkpoint says: "none", "norms" or "all". Anything else changes nothing.

    ValueError where norms are asked for and the network cannot recompute them.
    """
    if what in ("none", "norms", "all"):
        set_recomputing(net, blocks_of(net) if what == "all" else ())
        if not set_recomputing_norms(net, what == "norms") and what == "norms":
            raise ValueError(
                f"--checkpoint norms: {type(unwrapped(net)).__name__} cannot (it has no set_recompute_norms)"
            )


def measured(trainer: Trainer, batch: Any) -> Needs:
    """What a forward and backward pass of `trainer` needs, from passes over a few examples of `batch`.

    Raises torch.OutOfMemoryError where not even one example fits with every block recomputing.
    """
    blocks = blocks_of(trainer.net)
    before = {name: block.use_checkpoint for name, block in blocks.items()}
    trainer.net.train()
    try:
        for sizes in _SIZES:
            if sizes[-1] <= batching.length(batch):
                with contextlib.suppress(torch.OutOfMemoryError):
                    kept = [_kept(trainer, blocks, batch, count) for count in sizes]
                    alive = [_alive(trainer, blocks, batch, count) for count in sizes]
                    return _needs(trainer, list(blocks), kept, alive)
    finally:
        for name, block in blocks.items():
            block.use_checkpoint = before[name]
    raise torch.OutOfMemoryError("not even one example")


# ---------------------------------------------------------------------------------------------------------------------
# First kind of pass: what autograd keeps


class _Kept(NamedTuple):
    examples: int
    order: list[str]  # of the blocks, as they were called
    savings: dict[str, int]  # bytes that a block keeps and nobody else does
    anyway: int  # bytes that are kept whichever blocks recompute
    operations: dict[str, int]  # floating point operations of a block up to the last tensor it keeps
    all_operations: int


class _Keeper:
    """Takes note of every tensor that autograd keeps, by the block that runs, and keeps none of them."""

    def __init__(self, net: nn.Module, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.refs: dict[int, StorageWeakRef] = {}  # while they live, no other storage gets the same address
        self.bytes: dict[int, int] = {}
        self.inside: dict[str, set[int]] = {}  # by block: storages kept within
        self.inputs: dict[str, set[int]] = {}  # by block: storages of what it was given
        self.outside: set[int] = set()
        self.operations: dict[str, int] = {}
        self._begin = 0
        self._block: str | None = None
        self._foreign = {self._note(t) for t in [*net.parameters(), *net.buffers()]}

    def _note(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)
        if ref.cdata not in self.refs:
            self.refs[ref.cdata], self.bytes[ref.cdata] = ref, storage.nbytes()
        return ref.cdata

    def pack(self, tensor: Tensor) -> None:
        key = self._note(tensor)
        if self._block is None:
            self.outside.add(key)
        else:
            self.inside[self._block].add(key)
            # Recomputing ends when the last tensor is there, before the operation that keeps it.
            self.operations[self._block] = self.counter.get_total_flops() - self._begin

    def enter(self, name: str, args: Any) -> None:
        self._block, self._begin = name, self.counter.get_total_flops() - self.operations.get(name, 0)
        self.inside.setdefault(name, set())
        self.inputs.setdefault(name, set()).update(self._note(t) for t in tree_leaves(args) if isinstance(t, Tensor))

    def leave(self) -> None:
        self._block = None

    def result(self, count: int) -> _Kept:
        owners: dict[int, int] = {}
        for keys in self.inside.values():
            for key in keys:
                owners[key] = owners.get(key, 0) + 1
        given = set().union(*self.inputs.values())
        everything = (set(owners) | self.outside) - self._foreign
        savings = {}
        alone: set[int] = set()
        for name, keys in self.inside.items():
            own = {k for k in keys if owners[k] == 1} - given - self.outside - self._foreign
            alone |= own
            # An input that nobody keeps so far is kept by a block that recomputes.
            new = self.inputs[name] - everything - self._foreign
            savings[name] = sum(self.bytes[k] for k in own) - sum(self.bytes[k] for k in new)
        return _Kept(
            examples=count,
            order=list(self.inside),
            savings=savings,
            anyway=sum(self.bytes[k] for k in everything - alone),
            operations={name: self.operations.get(name, 0) for name in self.inside},
            all_operations=self.counter.get_total_flops(),
        )


def _kept(trainer: Trainer, blocks: dict[str, nn.Module], batch: Any, count: int) -> _Kept:
    for block in blocks.values():
        block.use_checkpoint = False  # type: ignore[assignment]
    counter = FlopCounterMode(display=False, custom_mapping=_attention_on_cpu())
    keeper = _Keeper(trainer.net, counter)
    with contextlib.ExitStack() as stack:
        for name, block in blocks.items():
            enter, leave = (lambda _, args, name=name: keeper.enter(name, args)), (lambda *_: keeper.leave())
            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keeper.pack, _never))
        stack.enter_context(counter)
        _loss(trainer, batch, count)
        return keeper.result(count)


def _never(_: Any) -> Tensor:
    raise AssertionError("a pass that keeps nothing has no backward")


def _attention_on_cpu() -> dict[Any, Any]:
    """The CPU's attention kernel, which torch's counter does not know."""
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

    def operations(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        n, h, t, d = query
        return 2 * n * h * t * key[2] * (d + value[3])

    return {} if kernel is None else {kernel: operations}


# ---------------------------------------------------------------------------------------------------------------------
# Second kind of pass: what is alive, from operation to operation


class _Event(NamedTuple):
    before: int  # how many blocks, in forward order, were over and still keep what they keep
    level: int  # bytes alive, of those that the pass itself took
    gradients: int  # of them, bytes in gradients of weights from earlier in this pass


class _Course(NamedTuple):
    events: list[_Event]
    hidden: int  # bytes that the device needed at most besides those of tensors


class _Alive(TorchDispatchMode):
    """Follows the bytes of the storages that operations make on `device`, until they die."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.level = self.before = self.gradients = 0
        self.events: list[_Event] = []
        self._refs: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, ours=False)
        result = func(*args, **kwargs)
        grown = [self._see(tensor, ours=True) for tensor in tree_leaves(result)]
        if any(grown):
            self.events.append(_Event(self.before, self.level, self.gradients))
        return result

    def _see(self, tensor: Any, *, ours: bool) -> bool:
        """Whether `tensor` brought new memory. What operations were given without having made it was there before."""
        if not isinstance(tensor, Tensor) or tensor.device.type != self.device.type:
            return False
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if ours else 0
        if key in self._refs:
            return False

        def died(_: Any) -> None:
            self.level -= size
            del self._refs[key]

        self._refs[key] = weakref.ref(storage, died)
        self.level += size
        return size > 0


def _alive(trainer: Trainer, blocks: dict[str, nn.Module], batch: Any, count: int) -> _Course:
    for block in blocks.values():
        block.use_checkpoint = True  # type: ignore[assignment]
    follower = _Alive(trainer.device)
    passed: list[str] = []

    def leave(name: str, result: Any) -> None:
        if name not in passed:
            passed.append(name)
        follower.before = len(passed)
        place = passed.index(name)

        def backward(_: Any) -> None:
            follower.before = place
            follower.gradients = sum(p.grad.nbytes for p in weights if p.grad is not None)

        # The block's backward pass begins here: the gradient of its output is complete.
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(backward)
                break

    memory.give_back(trainer.device)
    counts = memory.restart_peak(trainer.device)
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(twins(trainer.net))
        for name, block in blocks.items():
            hook = lambda _, __, result, name=name: leave(name, result)  # noqa: E731
            stack.callback(block.register_forward_hook(hook).remove)
        stack.enter_context(follower)
        pass_alone(trainer, batch, count)
    highest = memory.peak(trainer.device)
    weights.clear()
    memory.give_back(trainer.device)
    explained = memory.used(trainer.device) + max(event.level for event in follower.events)
    return _Course(follower.events, max(0, highest - explained) if counts else 0)


@contextlib.contextmanager
def twins(net: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The network with other parameters on the same memory, which take the gradients of the body and are returned.

    DistributedDataParallel listens to the real ones: it counts their gradients from the first backward pass on, and with
    static_graph would wait ever after for as many as came here.
    """
    real = [(module, dict(module._parameters)) for module in net.modules()]
    twin_of = {p: nn.Parameter(p.detach(), p.requires_grad) for p in net.parameters()}
    for module, parameters in real:
        module._parameters.update({name: p if p is None else twin_of[p] for name, p in parameters.items()})
    try:
        yield [twin for twin in twin_of.values() if twin.requires_grad]
    finally:
        for module, parameters in real:
            module._parameters.update(parameters)


def pass_alone(trainer: Trainer, batch: Any, count: int) -> None:
    """Add the gradients of the first `count` examples; the processes do not wait for each other. Within `twins`."""
    trainer.precision.scale(_loss(trainer, batch, count) / batching.length(batch)).backward()


def _loss(trainer: Trainer, batch: Any, count: int) -> Tensor:
    """The loss of the first `count` examples, summed."""
    ids = batching.positions(batch, trainer.world.rank, trainer.world.size)[:count]
    streams = Streams(trainer.seed, TRAIN, trainer.steps_done, ids=ids, device=trainer.device)
    part = batching.to_device(next(batching.split(batch, count)), trainer.device)
    return trainer.loss_fn(trainer.net, part, streams).loss.float().sum()


# ---------------------------------------------------------------------------------------------------------------------
# From two passes to straight lines


def _needs(trainer: Trainer, names: list[str], kept: list[_Kept], alive: list[_Course]) -> Needs:
    one, last = kept[0], kept[-1]

    def line(first: int, second: int) -> Line:
        if one.examples == last.examples:
            return Line(0, first / one.examples)
        return Line(first - one.examples * (second - first), second - first)

    order = [*one.order, *(name for name in names if name not in one.order)]
    blocks = [
        Block(
            name,
            line(one.savings.get(name, 0), last.savings.get(name, 0)),
            last.operations.get(name, 0) / last.examples,
        )
        for name in order
    ]
    moments = [moment for before in range(len(order) + 1) for moment in _hull(before, line, alive)]
    return Needs(
        blocks=tuple(blocks),
        moments=tuple(moments),
        kept_anyway=line(one.anyway, last.anyway),
        gradients=sum(p.nbytes for p in trainer.params),
        hidden=max(course.hidden for course in alive),
        operations=last.all_operations / last.examples,
    )


def _hull(before: int, line: Callable[[int, int], Line], alive: list[_Course]) -> Iterator[Moment]:
    """The moments with `before` blocks before them that can be the highest, at some number of examples from one on."""
    groups = [[event for event in course.events if event.before == before] for course in (alive[0], alive[-1])]
    if len(groups[0]) != len(groups[1]):  # more examples took other operations: then the highest of both
        groups = [sorted(group, key=_level)[-1:] for group in groups]
    found = [Moment(before, line(a.level, b.level), a.gradients) for a, b in zip(*groups)]
    for share in (1, 0):  # gradients of an earlier pass are not there, or are: then those of this one add nothing
        highest = -math.inf
        # From steep to flat: a flatter line is needed only where it starts higher, at one example.
        for moment in sorted(found, key=lambda m: (-m.alive.each, -m.alive.fixed)):
            start = moment.alive.fixed + moment.alive.each - (1 - share) * moment.gradients
            if start > highest:
                highest = start
                yield moment


def _level(event: _Event) -> int:
    return event.level
