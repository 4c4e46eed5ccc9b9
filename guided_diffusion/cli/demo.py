"""`guided-diffusion demo`: train a diffusion model and a classifier on handwritten digits, sample, score; without a download.

The digits that scikit-learn ships are written as image files. Training and sampling then are commands that a user could type.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..data.digits import write_digits
from ..runtime import storage
from .arguments import Parser

# Flags of the commands; tuned so that two CPU cores need less than ten minutes of training.
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
    "sweep": "--samplers ancestral --steps 50 --scales 0,1,2,4,8 --num_samples 400 --batch_size 100 --labels balanced --picture 50",
}
# Flags that --quick appends; of a flag given twice, the last value counts.
QUICK = {
    "train": "--lr_anneal_steps 60 --save_interval 30 --sample_interval 60 --log_interval 10 --batch_size 16",
    "train-classifier": "--iterations 60 --save_interval 60 --log_interval 10 --eval_interval 30",
    "sweep": "--num_samples 60 --batch_size 30 --steps 12",
}


def main(argv: Sequence[str], program: str) -> int:
    """Run the demo; returns 0. `--quick` takes the same steps with too little training for good samples."""
    parser = Parser(program, __doc__)
    parser.flag("out", "runs/demo", "folder for everything that is made")
    parser.flag("quick", False, "a minute instead of ten, digits not yet readable")
    parser.flag("seed", 0, "seed of training and of the samples")
    parser.flag("device", "auto", "auto, cpu or cuda")
    args = parser.parse_args(argv)

    from evaluations.plots import draw_progress
    from evaluations.tradeoffs import draw, table

    from ..sampling.sweeps import read_rows, write_picture
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
        words = [command, "--seed", str(args.seed), "--device", args.device, *plan.split(), *flags]
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
    networks = ("--model_path", f"{out}/diffusion", "--classifier_path", f"{out}/classifier", "--data_dir", train_dir)
    run("sweep", *networks, "--out", f"{out}/samples")
    lap("sampled at five scales, scored")
    few = ("--samplers", "fast", "--steps", "4" if args.quick else "17", "--scales", "1")
    run("sweep", *networks, *few, "--out", f"{out}/few_calls")
    lap("sampled with a third of the calls, scored")
    rows = [row for name in ("samples", "few_calls") for row in read_rows(f"{out}/{name}/sweep.json").values()]
    for row in rows[:-1]:
        write_picture(row, f"{out}/grid_scale_{row['scale']:g}.png")  # a column per digit
    curves = {"diffusion": "mse_q0 mse_q1 mse_q2 mse_q3", "classifier": "train_acc@1 val_acc@1"}
    draw_progress({f"{out}/{name}/progress.csv": columns for name, columns in curves.items()}, out / "curves.png")
    draw(rows, out)
    print("\n" + table(rows))
    storage.write_json_atomic(out / "scores.json", {"scores": rows, "seconds": seconds})
    print(f"everything is in {out}: grid_scale_*.png, curves.png, frontier.png, calls.png, scores.json")
    return 0
