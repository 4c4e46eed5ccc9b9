"""Ways through the 2021 training loop, float16 trainer, samplers of steps, pictures and logger, with what each calls by its name.

`python tests/doors/loop_calls.py loop_calls.json.gz`, with the 2021 package on PYTHONPATH, writes the facts of `test_calls.py`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from guided_diffusion import dist_util, fp16_util, image_datasets, logger, resample, train_util

NAMES = {
    "TrainLoop": """_load_and_sync_parameters _load_ema_parameters _load_optimizer_state run_step forward_backward _update_ema
        _anneal_lr log_step save""",
    "MixedPrecisionTrainer": """zero_grad backward optimize _optimize_fp16 _optimize_normal _compute_norms master_params_to_state_dict
        state_dict_to_master_params""",
    "ScheduleSampler": "sample",
    "LossAwareSampler": "update_with_local_losses",
    "LossSecondMomentResampler": "weights update_with_all_losses _warmed_up",
    "UniformSampler": "weights",
    "ImageDataset": "__getitem__ __len__",
    "Logger": "logkv logkv_mean dumpkvs log get_dir close _do_log set_level set_comm",
    "train_util": """MixedPrecisionTrainer AdamW UniformSampler LossAwareSampler update_ema parse_resume_step_from_filename get_blob_logdir
        find_resume_checkpoint find_ema_checkpoint log_loss_dict""",
    "fp16_util": """make_master_params model_grads_to_master_grads master_params_to_model_params unflatten_master_params
        get_param_groups_and_shapes master_params_to_state_dict state_dict_to_master_params zero_master_grads zero_grad
        param_grad_or_zeros check_overflow""",
    "resample": "UniformSampler LossSecondMomentResampler",
    "dist_util": "load_state_dict sync_params dev",
    "image_datasets": "ImageDataset DataLoader _list_image_files_recursively center_crop_arr random_crop_arr",
    "logger": """logkv logkv_mean dumpkvs log get_dir get_current make_output_format mpi_weighted_mean get_rank_without_mpi_import
        HumanOutputFormat JSONOutputFormat CSVOutputFormat _configure_default_logger configure""",
}
MODULES = {m.__name__.split(".")[-1]: m for m in (train_util, fp16_util, resample, dist_util, image_datasets, logger)}
CLASSES = {
    name: getattr(m, name) for name in NAMES.keys() - MODULES.keys() for m in MODULES.values() if hasattr(m, name)
}
PLACES = MODULES | CLASSES
TARGETS = [f"{place}.{name}" for place, names in NAMES.items() for name in names.split()]
# Told apart by the words or the devices they are asked with, which are ours to choose: called at least as often.
AT_LEAST = set(
    "dist_util.dev logger.get_current logger.log logger.get_dir Logger.log Logger._do_log Logger.get_dir".split()
)


class Net(torch.nn.Module):
    """Two lines, the same on every machine."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        for k, p in enumerate(self.parameters()):
            p.data.copy_(torch.from_numpy(np.random.RandomState(k).uniform(-1, 1, p.shape)))

    def convert_to_fp16(self):
        """Computes in float32 all the same."""

    def forward(self, x):
        return self.second(self.first(x))


class Diffusion:
    num_timesteps = 3

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        mse = ((model(x_start) * (1 + t[:, None]) - x_start) ** 2).mean(1)
        return {"loss": mse, "mse": mse}


def data(bad):
    """Batches of six; the losses of number `bad` are infinite."""
    draw = np.random.RandomState(5)
    for k in range(100):
        x = torch.from_numpy(draw.uniform(-1, 1, (6, 4)).astype(np.float32))
        yield x if k != bad else x / 0, {"y": torch.zeros(6, dtype=torch.long)}


def loop(bad=None, **options):
    settings = {
        "model": Net(),
        "diffusion": Diffusion(),
        "data": data(bad),
        "batch_size": 6,
        "microbatch": 3,
        "lr": 0.1,
    }
    settings |= {
        "ema_rate": "0.5,0.9",
        "log_interval": 2,
        "save_interval": 3,
        "resume_checkpoint": "",
        "lr_anneal_steps": 5,
    }
    return train_util.TrainLoop(**(settings | options))


def train(folder, **options):
    """Train, and tell the files, the rows, and the figures of weights, averages and rate."""
    rows = Rows()
    logger.get_current().output_formats.append(rows)
    run = loop(**options)
    run.run_loop()
    groups = [run.mp_trainer.master_params, *run.ema_params]
    return {
        "files": files_of(folder),
        "rows": rows.seen,
        "figures": [figures(p.detach()) for group in groups for p in group],
        "rate": [figure(group["lr"]) for group in run.opt.param_groups],
        "scale": figure(run.mp_trainer.lg_loss_scale),
    }


def files_of(folder):
    """Names, and what the files of weights hold."""
    found = {}
    for path in sorted(Path(folder).rglob("*.pt")):
        content = torch.load(path) if "opt" not in path.name else {}
        flat = [p.detach().flatten() for p in content.values()]
        found[str(path.relative_to(folder))] = figures(torch.cat(flat)) if flat else []
    return found


class Rows(logger.KVWriter):
    def __init__(self):
        self.seen = []

    def writekvs(self, kvs):
        values = [float(value) for value in kvs.values()]
        self.seen.append([*sorted(kvs), figure(sum(value for value in values if math.isfinite(value)))])

    def close(self):
        """Nothing to close."""


def resumed(folder, **options):
    loop(**options).run_loop()
    return train(folder, resume_checkpoint=os.path.join(folder, "model000003.pt"), **options)


def aware(folder):
    sampler = resample.create_named_schedule_sampler("loss-second-moment", Diffusion())
    return learned(folder, sampler)


def learned(folder, sampler):
    outcome = train(folder, schedule_sampler=sampler, lr_anneal_steps=12)
    memory = [figures(getattr(sampler, name, 0.0)) for name in ("_loss_history", "_loss_counts")]
    return {**outcome, "weights": [figure(w) for w in sampler.weights()], "memory": memory}


class Hasty(resample.LossSecondMomentResampler):
    """Warm from the start, and keeps its memory in its own way."""

    def __init__(self, *args):
        super().__init__(*args)
        self._loss_history = self._loss_history + 1
        self._loss_counts[:2] = self.history_per_term

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses):
            self._loss_history[t, self._loss_counts[t] % 2] = loss
            self._loss_counts[t] = self.history_per_term


def pictures(folder):
    paths = []
    for k in range(5):
        paths.append(os.path.join(folder, f"{'ab'[k % 2]}_{k}.png"))
        Image.fromarray(np.random.RandomState(k).randint(0, 256, (9 + k, 12, 3), np.uint8)).save(paths[-1])
    return sorted(paths)


def items(folder):
    paths, found = pictures(folder), []
    random.seed(3)
    for random_crop in (False, True):
        dataset = image_datasets.ImageDataset(8, paths, classes=[0, 0, 0, 1, 1], random_crop=random_crop)
        found += [dataset[k] for k in range(len(dataset))]
    return [[*figures(array), int(extra["y"])] for array, extra in found]


def batches(folder):
    pictures(folder)
    options = {"batch_size": 2, "image_size": 8, "class_cond": True, "deterministic": True, "random_flip": False}
    found = islice(image_datasets.load_data(data_dir=folder, **options), 3)
    return [[*figures(images), extra["y"].tolist()] for images, extra in found]


def words(folder):
    with logger.scoped_configure(dir=folder, format_strs=["stdout", "log", "json", "csv"]):
        logger.logkvs({"b": 1.0, "a": 2.5})
        logger.logkv_mean("c", 3.0)
        logger.logkv_mean("c", 4.0)
        logger.dumpkvs()
        logger.debug("quiet")
        logger.info("loud")
        logger.warn("louder")
        logger.error("loudest")

    def lines(names):
        return [line for path in sorted(Path(folder).glob(names)) for line in path.read_text().splitlines()]

    said = [line for line in lines("log*.txt") if "lou" in line]
    rows = [sorted(json.loads(line).items()) for line in lines("*.json")]
    return {"files": sorted(os.listdir(folder)), "said": said, "rows": rows}


SCENARIOS = {
    "float32": train,
    "float16": lambda folder: train(folder, use_fp16=True, bad=1),
    "float32 resumed": resumed,
    "float16 resumed": lambda folder: resumed(folder, use_fp16=True),
    "aware": aware,
    "aware subclass": lambda folder: learned(folder, Hasty(Diffusion(), 3, 0.1)),
    "items": items,
    "batches": batches,
    "words": words,
}


def figure(value):
    return float(f"{float(value):.6g}")


def figures(tensor):
    """Mean and root mean square."""
    numbers = torch.as_tensor(np.ascontiguousarray(tensor)).double()
    return [figure(numbers.mean()), figure(numbers.square().mean().sqrt())]


# --- what is put in place of the originals ---


def bent(target, original):
    """Something else in the place of `target`: a change of its result, or nothing done where it has none."""
    name = target.split(".")[1]
    if isinstance(original, type):
        return BENT[name](original)
    if target in SPECIAL:
        return SPECIAL[target](original)
    if name in SKIPPED:
        return lambda *args, **kwargs: None
    return lambda *args, **kwargs: other(original(*args, **kwargs))


SKIPPED = """_load_and_sync_parameters _load_optimizer_state run_step forward_backward _update_ema _anneal_lr log_step save zero_grad
backward update_with_local_losses update_with_all_losses update_ema log_loss_dict master_params_to_model_params zero_master_grads
sync_params logkv logkv_mean log dumpkvs close _do_log set_level set_comm configure _configure_default_logger""".split()


def elsewhere(original):
    def found(*args):
        folder = os.path.join(original(*args), "elsewhere")
        os.makedirs(folder, exist_ok=True)
        return folder

    return found


def earlier(original):
    def found():
        path = os.path.join(logger.get_dir(), "model000000.pt")
        return path if os.path.exists(path) else None

    return found


def tripled(original):
    def made(*args):
        original(*args)
        for master in args[1]:
            master.grad *= 3

    return made


def smaller(original):
    def made(*args):
        masters = original(*args)
        with torch.no_grad():
            return [master.mul_(0.5) for master in masters]

    return made


def weights_only(original):
    def read(path, **kwargs):
        state = original(path, **kwargs)
        return state if "state" in state else other(state)

    return read


SPECIAL = {
    **dict.fromkeys(("train_util.get_blob_logdir", "logger.get_dir", "Logger.get_dir"), elsewhere),
    "train_util.find_resume_checkpoint": earlier,
    "train_util.find_ema_checkpoint": lambda original: lambda *args: None,
    "fp16_util.make_master_params": smaller,
    "fp16_util.check_overflow": lambda original: lambda value: True,
    "fp16_util.model_grads_to_master_grads": tripled,
    "fp16_util.get_param_groups_and_shapes": lambda original: lambda named: original(named)[::-1],
    "dist_util.load_state_dict": weights_only,
    "UniformSampler.weights": lambda original: lambda self: np.array([1.0, 2.0, 3.0]),
    "LossSecondMomentResampler._warmed_up": lambda original: lambda self: False,
    "ImageDataset.__getitem__": lambda original: lambda self, k: original(self, 0),
    "ImageDataset.__len__": lambda original: lambda self: 3,
    "image_datasets._list_image_files_recursively": lambda original: lambda folder: original(folder)[::-1],
    "logger.make_output_format": lambda original: lambda *args: original("json", args[1], "-" + args[0]),
    "logger.get_rank_without_mpi_import": lambda original: lambda: 4,
}


class Third:
    """Steps that are all the third."""

    def __init__(self, diffusion):
        pass

    def sample(self, n, device):
        return torch.full((n,), 2), torch.ones(n)

    def weights(self):
        return np.ones(3)


def louder(original):
    class Mine(original):
        def backward(self, loss):
            super().backward(3 * loss)

    return Mine


def brighter(original):
    class Mine(original):
        def __getitem__(self, k):
            array, extra = super().__getitem__(k)
            return array + 0.5, extra

    return Mine


def own_file(original):
    class Mine(logger.KVWriter, logger.SeqWriter):
        def __init__(self, filename_or_file):
            if isinstance(filename_or_file, str):
                open(filename_or_file + ".mine", "w").close()

        def writekvs(self, kvs):
            """Left out."""

        def writeseq(self, seq):
            """Left out."""

        def close(self):
            """Nothing to close."""

    return Mine


BENT = {
    "MixedPrecisionTrainer": louder,
    "AdamW": lambda original: lambda params, lr, weight_decay: torch.optim.SGD(params, lr=lr),
    "UniformSampler": lambda original: Third,
    "LossSecondMomentResampler": lambda original: Third,
    "LossAwareSampler": lambda original: type("NoneIs", (), {}),
    "ImageDataset": brighter,
    "DataLoader": lambda original: lambda dataset, batch_size, **k: original(dataset, batch_size=1, **k),
    **dict.fromkeys(("HumanOutputFormat", "JSONOutputFormat", "CSVOutputFormat"), own_file),
}


def other(value):
    if isinstance(value, torch.Tensor):
        return 1.1 * value + 0.01 if value.is_floating_point() else value.flip(0)
    if isinstance(value, np.ndarray):
        return value[::-1] + value.dtype.type(1)
    if isinstance(value, dict):
        return {key: other(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(other(item) for item in value)
    if isinstance(value, Iterator):
        return (other(item) for item in value)
    if isinstance(value, (bool, np.bool_)):
        return not value
    return value + 1


@contextmanager
def changed(change):
    """`change(target, original)` in place of each method and function."""
    before = {target: getattr(PLACES[target.split(".")[0]], target.split(".")[1]) for target in TARGETS}
    try:
        for target, original in before.items():
            put(target, change(target, original))
        yield
    finally:
        for target, original in before.items():
            put(target, original)


def put(target, value):
    place, name = target.split(".")
    setattr(PLACES[place], name, value)


def play(scenario, change):
    """The outcome of a scenario, or "error"."""
    np.random.seed(1)
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(dir=folder, format_strs=[]), changed(change):
        try:
            return SCENARIOS[scenario](folder)
        except Exception:
            return "error"


def calls(scenario):
    return counted(play, scenario, lambda target: target.split(".")[0] in CLASSES)


def counted(play, scenario, is_method):
    """How often each method and function is called, and with how many positional and which named arguments."""
    count, styles = Counter(), {}

    def counting(target, original):
        if target == "train_util.LossAwareSampler":  # a class that is asked about, not called
            return original

        def called(*args, **kwargs):
            count[target] += 1
            style = f"{len(args) - is_method(target)} {' '.join(sorted(kwargs))}"
            styles.setdefault(target, set()).add(style.strip())
            return original(*args, **kwargs)

        return called

    play(scenario, counting)
    return dict(count), styles


def overridden(scenario, target):
    """The outcome when `target` does something else than it should."""
    return play(scenario, lambda name, original: bent(name, original) if name == target else original)


def main(path):
    if not hasattr(np, "int"):
        np.int = int  # which 2021 asks for
    torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    facts, styles, tried = {"counts": {}, "overridden": {}}, {}, set()
    for name in SCENARIOS:
        count, seen = calls(name)
        facts["counts"][name] = count
        for target, ways in seen.items():
            styles.setdefault(target, set()).update(ways)
        plain = play(name, lambda target, original: original)
        assert plain != "error" and count, name
        outcomes = {target: overridden(name, target) for target in TARGETS if name == "batches" or target not in tried}
        outcomes = {target: outcome for target, outcome in outcomes.items() if outcome not in (plain, "error")}
        facts["overridden"][name] = {"": plain, **outcomes}
        tried |= set(outcomes)  # each in the first of the scenarios that it changes, and in the loading of batches
    torch.distributed.destroy_process_group()
    write(path, facts, styles)


def write(path, facts, styles):
    facts["styles"] = {target: sorted(ways) for target, ways in sorted(styles.items())}
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(facts, file, separators=(",", ":"))


if __name__ == "__main__":
    main(sys.argv[1])
