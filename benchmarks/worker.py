"""One side of `python -m benchmarks --against FOLDER`: a process that imports `guided_diffusion` from the folder it is given.

It runs as a script, and uses only names of the 2021 package: networks from `script_util`, `ddim_sample_loop`, `TrainLoop`.
Its argument is a JSON object (`against.Order`). It prints one JSON value per line: first that it is ready, then an answer
to each word that it reads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any


class Side:
    """The networks of one package, with weights that depend on the parameters' names alone."""

    def __init__(self, order: dict[str, Any]) -> None:
        import torch

        from guided_diffusion import dist_util, logger, script_util

        self.order, self.torch, self.script_util = order, torch, script_util
        self.cuda = order["device"].startswith("cuda")
        if not self.cuda:
            torch.set_num_threads(1)
        logger.configure(dir=tempfile.mkdtemp(), format_strs=[])
        dist_util.setup_dist()
        self.device = dist_util.dev()

    def generator(self) -> tuple[Any, Any]:
        """The generator and its process of `steps` steps."""
        flags = {**self.script_util.model_and_diffusion_defaults(), "use_fp16": self.cuda}
        flags |= {name: value for name, value in self.order["model"].items() if name in flags and name != "use_fp16"}
        flags["timestep_respacing"] = f"ddim{self.order['steps']}" if self.order["work"] == "sampling" else ""
        net, process = self.script_util.create_model_and_diffusion(**flags)
        return self.filled(net), process

    def classifier(self) -> Any:
        """The classifier, ready to guide."""
        flags = {**self.script_util.classifier_defaults(), "classifier_use_fp16": self.cuda}
        flags |= {name: value for name, value in self.order["classifier"].items() if name in flags}
        return self.frozen(self.filled(self.script_util.create_classifier(**flags)))

    def filled(self, net: Any) -> Any:
        """Every parameter random, drawn from a seed that is made of its name."""
        torch = self.torch
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
                scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
                parameter.copy_(scale * noise + (1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0))
        return net.to(self.device)

    def frozen(self, net: Any) -> Any:
        """In eval mode, and on a GPU in float16, as the sampling scripts of 2021 have it."""
        if self.cuda:
            net.convert_to_fp16()
        return net.eval()

    def inputs(self, batch: int) -> tuple[Any, Any, Any]:
        """Noise, times and labels, the same on each side."""
        torch, size = self.torch, self.order["model"]["image_size"]
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))
        return tuple(part.to(self.device) for part in (x, torch.arange(batch) * 100 % 1000, torch.arange(batch)))


def forward(side: Side) -> Callable[[], Any]:
    """A forward pass without gradients."""
    net = side.frozen(side.generator()[0])
    x, t, y = side.inputs(side.order["batch"])

    def run() -> Any:
        with side.torch.no_grad():
            return net(x, t, y)

    return run


def sampling(side: Side) -> Callable[[], Any]:
    """DDIM guided by the gradient of log p(y | x), as `scripts/classifier_sample.py` makes images."""
    torch = side.torch
    net, process = side.generator()
    net, critic = side.frozen(net), side.classifier()
    x, _, y = side.inputs(side.order["batch"])

    def gradient(x: Any, t: Any, y: Any = None) -> Any:
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            log_probs = critic(at, t).log_softmax(dim=-1)
            return torch.autograd.grad(log_probs.gather(1, y.view(-1, 1)).sum(), at)[0]

    def run() -> Any:
        cond = {"y": y}
        return process.ddim_sample_loop(net, x.shape, noise=x, model_kwargs=cond, cond_fn=gradient, device=side.device)

    return run


def training(side: Side) -> Callable[[], Any]:
    """An update by TrainLoop, its log included; images lie in main memory, as the loader gives them."""
    from guided_diffusion.train_util import TrainLoop

    net, process = side.generator()
    x, _, y = (part.cpu() for part in side.inputs(side.order["batch"]))
    never: Any = {"log_interval": 10**9, "save_interval": 10**9, "resume_checkpoint": ""}
    loop = TrainLoop(
        model=net, diffusion=process, data=iter([]), batch_size=len(x), microbatch=-1, lr=1e-4, ema_rate="0.9999",
        use_fp16=side.cuda, **never,
    )  # fmt: skip
    x = x.clamp(-1, 1)

    def run(microbatch: int | None = None) -> None:
        loop.microbatch = microbatch or len(x)
        loop.run_step(x, {"y": y})

    return run


def images_that_fit(side: Side, run: Callable[..., Any], memory: Memory) -> int:
    """About how many images a training step on this GPU can take, from the peaks of its batch and of half of it."""
    whole = side.order["batch"]
    peaks = []
    for count in (whole // 2, whole):
        side.torch.cuda.empty_cache()
        memory.forget()
        run(count)
        peaks.append(memory.peak())
    each = (peaks[1] - peaks[0]) / (whole - whole // 2)
    total = side.torch.cuda.get_device_properties(side.device).total_memory
    return int(whole + (total - peaks[1]) / each)


def provide_what_is_missing() -> None:
    """Stand in for mpi4py and blobfile, which the 2021 package imports, where they are not installed: one process, local files."""
    world = SimpleNamespace(rank=0, size=1, bcast=lambda value, root=0: value, Get_rank=lambda: 0, Get_size=lambda: 1)
    files = {
        "BlobFile": open,
        **{name: getattr(os.path, name) for name in ("join", "exists", "dirname", "basename", "isdir")},
    }
    for name, content in {"mpi4py": {"MPI": SimpleNamespace(COMM_WORLD=world)}, "blobfile": files}.items():
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__dict__.update(content)
    socket.getfqdn = lambda name="": "localhost"  # a lent machine may not know its own name


class Memory:
    """The most memory that was in use since `forget`: of a GPU that of tensors, else that of the process (Linux)."""

    def __init__(self, torch: Any, cuda: bool) -> None:
        self.torch, self.cuda = torch, cuda

    def forget(self) -> None:
        """Count from now on."""
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")

    def peak(self) -> int:
        """Bytes; 0 where the system does not tell."""
        if self.cuda:
            return int(self.torch.cuda.max_memory_allocated())
        if not os.path.exists("/proc/self/status"):
            return 0
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def main() -> None:
    """Prepare the work, then answer `time`, `peak` and `save PATH` until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the packages print must not mix with answers
    order = json.loads(sys.argv[1])
    sys.path[0] = order["folder"]  # in the place of this file's own folder
    provide_what_is_missing()
    import guided_diffusion

    found = os.path.realpath(guided_diffusion.__path__[0])
    if not found.startswith(os.path.realpath(order["folder"]) + os.sep):
        raise ImportError(f"guided_diffusion was found in {found}, not in {order['folder']}")
    side = Side(order)
    run = {"forward": forward, "sampling": sampling, "training": training}[order["work"]](side)
    memory = Memory(side.torch, side.cuda)
    memory.forget()
    before = memory.peak()

    def now() -> float:
        if not side.cuda:
            return time.process_time()
        side.torch.cuda.synchronize()
        return time.perf_counter()

    print(json.dumps("ready"), file=answers)
    training_on_gpu = side.cuda and order["work"] == "training"
    for line in sys.stdin:
        word, _, path = line.strip().partition(" ")
        answer: Any = None
        if word == "time":
            if training_on_gpu:  # its memory went to the other side meanwhile
                run()
            begin = now()
            run()
            answer = now() - begin
        elif word == "fits":
            answer = images_that_fit(side, run, memory) if training_on_gpu else 0
        elif word == "peak":
            answer = memory.peak() - before
        elif word == "save":
            found = run()
            if found is not None:
                side.torch.save(found.float().cpu(), path)
            answer = found is not None
        if training_on_gpu:
            side.torch.cuda.empty_cache()
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
