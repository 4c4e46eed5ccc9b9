"""`guided-diffusion demo`: train a diffusion model and a classifier on handwritten digits, sample, score; without a download.

The 1,797 digits of 8x8 pixels that scikit-learn ships (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
Digits, UCI Machine Learning Repository, 1998; CC BY 4.0) are written as image files. Training and sampling then are commands that
a user could type.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..runtime import storage
from . import runs
from .arguments import Parser

SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
SCORES = ("fd", "precision", "recall", "accuracy")
HELD_OUT = 5  # every fifth digit is kept from training, for the classifier's validation
# Flags of the three commands; tuned so that two CPU cores need less than ten minutes of training.
PLAN = {
    "train": "--image_size 8 --image_channels 1 --class_cond True --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 "
    "--attention_resolutions 4 --num_head_channels 16 --resblock_updown True --use_scale_shift_norm True "
    "--learn_sigma True --noise_schedule cosine --diffusion_steps 1000 --dropout 0.1 --random_flip False "
    "--batch_size 64 --lr 1e-3 --warmup_steps 100 --lr_anneal_steps 3000 --ema_rate 0.998 "
    "--save_interval 1000 --sample_interval 1000 --log_interval 50",
    "train-classifier": "--image_size 8 --image_channels 1 --classifier_width 32 --classifier_depth 1 "
    "--classifier_channel_mult 1,2 --classifier_attention_resolutions 4 --classifier_num_head_channels 32 "
    "--classifier_pool attention --noise_schedule cosine --diffusion_steps 1000 --random_flip False --random_crop False "
    "--batch_size 64 --lr 1e-3 --iterations 1000 --anneal_lr True --weight_decay 0.05 --save_interval 1000 "
    "--log_interval 50 --eval_interval 50",
    "sample": "--num_samples 400 --batch_size 100 --timestep_respacing 50 --labels balanced --grid 50",
}
# Flags that --quick appends; of a flag given twice, the last value counts.
QUICK = {
    "train": "--lr_anneal_steps 60 --save_interval 30 --sample_interval 60 --log_interval 10 --batch_size 16",
    "train-classifier": "--iterations 60 --save_interval 60 --log_interval 10 --eval_interval 30",
    "sample": "--num_samples 60 --batch_size 30 --timestep_respacing ddim10",
}


def main(argv: Sequence[str], program: str) -> int:
    """Run the demo; returns 0. `--quick` takes the same steps with too little training for good samples."""
    parser = Parser(program, __doc__)
    parser.flag("out", "runs/demo", "folder for everything that is made")
    parser.flag("quick", False, "a minute instead of ten, digits not yet readable")
    parser.flag("seed", 0, "seed of training and of the samples")
    parser.flag("device", "auto", "auto, cpu or cuda")
    args = parser.parse_args(argv)

    from .main import main as command_line

    out, began = Path(args.out), time.monotonic()
    seconds: dict[str, float] = {}

    def lap(what: str) -> None:
        """Print and store the wall-clock seconds since the last lap."""
        seconds[what] = round(time.monotonic() - began - sum(seconds.values()), 1)
        print(f"== {what}: {seconds[what]:.1f} s", flush=True)

    def run(command: str, *flags: str) -> None:
        """Print a guided-diffusion command as a user would type it, and run it in this process."""
        plan = PLAN[command] + (f" {QUICK[command]}" if args.quick else "")
        words = [command, *flags, "--seed", str(args.seed), "--device", args.device, *plan.split()]
        print("\n$ guided-diffusion " + " ".join(words), flush=True)
        if code := command_line(words):
            raise SystemExit(code)

    train_dir, val_dir = write_digits(out / "data")
    lap("digits written as files")
    data = ("--data_dir", train_dir, "--resume_checkpoint", "auto")
    run("train", *data, "--out", f"{out}/diffusion")
    lap("diffusion model trained")
    run("train-classifier", *data, "--val_data_dir", val_dir, "--out", f"{out}/classifier")
    lap("noisy-image classifier trained")
    networks = ("--model_path", f"{out}/diffusion", "--classifier_path", f"{out}/classifier")
    for scale in SCALES:
        run("sample", *networks, "--classifier_scale", str(scale), "--out", samples_of(out, scale))
        lap(f"sampled at scale {scale:g}")
    table = score(out, train_dir, args.device)
    lap("scored")
    for scale in SCALES:
        write_picture(out, scale)
    write_plots(out, table)
    print_table(table)
    storage.write_json_atomic(out / "scores.json", {"scores": table, "seconds": seconds})
    print(f"everything is in {out}: grid_scale_*.png, curves.png, trade.png, scores.json")
    return 0


def samples_of(out: Path, scale: float) -> str:
    """The folder of the samples at a scale."""
    return str(out / "samples" / f"scale_{scale:g}")


def write_digits(folder: Path) -> tuple[str, str]:
    """Write the digits as 8x8 grey PNG files, `train/DIGIT/NNNN.png` and `val/DIGIT/NNNN.png`; returns both folders."""
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the demo's digits come with scikit-learn: pip install 'guided-diffusion[demo]'") from None

    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        split = "val" if index % HELD_OUT == 0 else "train"
        path = folder / split / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(path)
    return str(folder / "train"), str(folder / "val")


def score(out: Path, data_dir: str, device: str) -> list[dict[str, float]]:
    """Rows (scale, fd, precision, recall, accuracy) of the samples against the training digits, in the classifier's features.

    The distance is Frechet's as in FID, over the classifier's features instead of Inception's: "FID-like".
    """
    from evaluations.metrics import frechet_distance_of_features
    from evaluations.neighbours import neighbours

    from ..sampling.features import classifier_features, read_images
    from ..sampling.jobs import finished_npz
    from ..weights.load import load

    rows = []
    with runs.session(device) as here:
        classifier = load(str(out / "classifier"), kind="classifier", device=here.device)
        real, _ = classifier_features(classifier, read_images(data_dir, classifier, 100)[0])
        for scale in SCALES:
            images, labels = read_images(finished_npz(samples_of(out, scale)), classifier, 100)
            made, predicted = classifier_features(classifier, images)
            near, accuracy = neighbours(made, real), float((predicted == labels).mean())
            scores = (frechet_distance_of_features(made, real), near.precision, near.recall, accuracy)
            rows.append({"scale": scale, **{name: round(value, 4) for name, value in zip(SCORES, scores)}})
    return rows


def print_table(rows: list[dict[str, float]]) -> None:
    """Print the scores by guidance scale: fidelity (precision) against diversity (recall), as in the paper."""
    print("\n scale  FD (lower is better)  precision  recall  classifier accuracy")
    for row in rows:
        scale, fd, precision, recall, accuracy = row.values()
        print(f"{scale:6g}  {fd:20.3f}  {precision:9.3f}  {recall:6.3f}  {accuracy:19.3f}")


def write_picture(out: Path, scale: float) -> None:
    """`grid_scale_*.png`: a column per digit, enlarged with bicubic interpolation."""
    import numpy as np
    from PIL import Image

    from ..sampling.jobs import finished_npz
    from ..sampling.writers import write_grid

    with np.load(finished_npz(samples_of(out, scale)), allow_pickle=False) as held:
        images, labels = held["arr_0"], held["arr_1"]
    of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
    chosen = [column[row] for row in range(6) for column in of_digit if row < len(column)]
    large = [Image.fromarray(images[k, ..., 0]).resize((64, 64), Image.Resampling.BICUBIC) for k in chosen]
    pixels = np.stack([np.asarray(picture) for picture in large])[..., None]
    write_grid(str(out / f"grid_scale_{scale:g}.png"), pixels, [str(labels[k]) for k in chosen], columns=10)


def write_plots(out: Path, rows: list[dict[str, float]]) -> None:
    """Write `curves.png` (both training runs) and `trade.png` (scores by guidance scale), if matplotlib is installed."""
    import csv

    try:
        import matplotlib
    except ImportError:
        print("no plots without matplotlib: pip install 'guided-diffusion[demo]'")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    curves = {"diffusion": (left, "mse_q0 mse_q1 mse_q2 mse_q3"), "classifier": (right, "train_acc@1 val_acc@1")}
    for run_name, (axes, columns) in curves.items():
        with open(out / run_name / "progress.csv", newline="", encoding="utf-8") as lines:
            table = list(csv.DictReader(lines))
        for column in columns.split():
            points = [(float(row["step"]), float(row[column])) for row in table if row.get(column)]
            if points:
                axes.plot(*zip(*points), label=column, linewidth=1)
        axes.set(title=run_name, xlabel="step")
        axes.legend()
    left.set_yscale("log")
    figure.savefig(out / "curves.png", dpi=110)

    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for column in SCORES[1:]:
        axes.plot([row["scale"] for row in rows], [row[column] for row in rows], marker="o", label=column)
    axes.set(xlabel="classifier scale", title="what guidance trades")
    axes.legend()
    figure.savefig(out / "trade.png", dpi=110)
    plt.close("all")
