"""Score sets of images: encode them, compute their statistics, and all metrics against a reference.

`evaluate` does what the command does. It uses a `Scorer`, which holds the reference and scores any number of sample sets against
it; each set is read once.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from guided_diffusion.runtime.launchers import Place

from . import metrics, neighbours, report, statistics, uncertainty
from .commands import place
from .encoders import Encoder, make_encoder
from .features import pick_device
from .settings import Settings
from .shards import Features
from .sources import ImageSource

CUSTOMARY_PR_REFERENCES = 10_000
log = logging.getLogger(__name__)


class Side(NamedTuple):
    """One set of images, sample or reference: its features, and the statistics from which Frechet distances are computed."""

    about: report.Set
    features: np.ndarray
    """[N, d]"""
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    pool: statistics.Statistics
    spatial: statistics.Statistics | None


class Scored(NamedTuple):
    """A set's report, and by score name the standard errors with the influences from which they are computed."""

    report: report.SetReport
    errors: dict[str, uncertainty.Uncertainty]


class Scorer:
    """Holds an encoder and a reference; scores sample sets against it.

    With several processes, each does its share of the encoding in `read_reference` and `score`; only the first one gets scores, the
    others None.
    """

    def __init__(self, settings: Settings, *, encoder: Encoder | None = None, world: Place | None = None) -> None:
        self.settings = settings
        if unknown := [name for name in settings.metrics if name not in metrics.METRICS]:
            raise ValueError(f"metrics is {unknown[0]!r}, allowed are {', '.join(metrics.METRICS)}")
        self.world = world or place()
        self.device = pick_device(self.world, settings.device)
        self.encoder = encoder or make_encoder(settings, self.device)
        # Some devices, such as Apple's MPS, have no float64.
        self.algebra = self.device if self.device.type in ("cpu", "cuda") else torch.device("cpu")
        self.reference: Side | None = None
        self._radii: np.ndarray | None = None
        self._roots: dict[str, torch.Tensor] = {}

    def open(self, source: Any) -> ImageSource:
        """Open a set of images. ValueError now, not after hours of encoding, if it cannot be scored."""
        images = self.encoder.open(source)
        if self.settings.per_class:
            try:
                images.want_labels()
            except ValueError as error:
                raise ValueError(f"{error}. Scores per class (--per_class, --all) need them") from error
        if self._stored(images) is None and images.count is not None:
            _refuse_few(images.name, images.count)
        return images

    def _stored(self, images: ImageSource) -> statistics.Stored | None:
        return images.statistics() if self.encoder.name == "inception" else None  # precomputed ones are of Inception

    def read_reference(self, images: ImageSource) -> None:
        """Encode the reference; use the precomputed statistics of its file, if there are any."""
        self.reference = self._read(images, "reference")

    def score(self, images: ImageSource) -> Scored | None:
        """All wanted scores of one set of samples."""
        sample = self._read(images, "sample")
        if sample is None or self.reference is None:
            return None
        log.info("Computing evaluations...")
        return self._score(sample, self.reference)

    def _read(self, images: ImageSource, role: str) -> Side | None:
        stored = self._stored(images)
        log.info(f"computing {role} batch activations...")
        nothing = Features(np.empty((0, 0), np.float32))  # for files with statistics but without images
        encoded = nothing if images.count == 0 else self.encoder.encode(images, self.settings, self.world)
        if encoded is None or self.world.rank != 0:
            return None
        notes = tuple(sorted(images.notes))
        for note in notes:
            _warn(f"{images.name}: {note}")
        if not np.isfinite(encoded.pool).all():
            raise ValueError(f"{images.name}: features hold values that are not finite (nan or infinity)")
        log.info(f"computing/reading {role} batch statistics...")
        origin = "from its images" if stored is None else "precomputed in the file"
        if stored is None:
            _refuse_few(images.name, len(encoded.pool))  # again: of an iterable the count is only known now
            pool, spatial = (None if rows is None else statistics.from_features(rows) for rows in encoded)
        else:
            pool, spatial = stored
            if spatial is None:
                _warn(f"{images.name} holds mu and sigma without mu_s and sigma_s: sFID is left out")
        assert pool is not None
        about = report.Set(images.name, images.sha256(), len(encoded.pool), images.shape, origin, notes)
        names = images.class_names() if self.settings.per_class else ()
        return Side(about, encoded.pool, self._labels(images, role), names, pool, spatial)

    def _labels(self, images: ImageSource, role: str) -> np.ndarray | None:
        """Labels, if scores per class need them; if they can be read, for the Inception Score, which warns of sorted samples, and for
        standard errors, which are smaller where classes are balanced."""
        if self.settings.per_class:
            return images.labels()
        with suppress(ValueError, OSError):
            wanted = self.settings.errors or self.encoder.weight is not None
            return images.labels() if role == "sample" and wanted else None
        return None

    def _score(self, sample: Side, reference: Side) -> Scored:
        settings, device = self.settings, self.algebra
        ours, theirs = sample.about.shape, reference.about.shape
        if ours and theirs and ours != theirs:
            _warn(
                f"{sample.about.name} holds images of {ours[1]}x{ours[0]}, {reference.about.name} of {theirs[1]}x{theirs[0]} (width x "
                "height): each is resized from its own size, which moves all scores. Compare images of one size"
            )
        values: dict[str, float] = {}
        errors: dict[str, uncertainty.Uncertainty] = {}
        if self.encoder.weight is not None and len(sample.features):
            inception = metrics.inception_score(
                sample.features, self.encoder.weight, split_size=settings.split_size, device=device
            )
            self._warn_of_splits(sample, inception)
            values["Inception Score"] = inception.score
            errors["Inception Score"] = uncertainty.mean_se(inception.influence)
        name = "FID" if self.encoder.name == "inception" else f"FD {self.encoder.name}"
        values[name] = self._frechet(name, sample.pool, reference.pool, errors)
        if sample.spatial is not None and reference.spatial is not None:
            values["sFID"] = self._frechet("sFID", sample.spatial, reference.spatial, errors)
        balls = self._neighbours(sample, reference)
        values |= {"Precision": float("nan"), "Recall": float("nan")}
        if balls is not None:
            values |= {"Precision": balls.precision, "Recall": balls.recall}
            errors["Precision"] = uncertainty.mean_se(balls.inside_reference, "binomial over samples")
            errors["Recall"] = uncertainty.group_jackknife_se(balls.by_group)
            if settings.density_coverage:
                values |= {"Density": balls.density, "Coverage": balls.coverage}
                method = "spread of counts over samples"
                errors["Density"] = uncertainty.mean_se(balls.ball_counts / balls.k, method)
                errors["Coverage"] = uncertainty.group_jackknife_se(balls.occupied_by_group)
        further = dict.fromkeys((*["KID"] * settings.kid, *settings.metrics))  # each name once
        for metric in further if min(len(sample.features), len(reference.features)) > 1 else ():
            result = metrics.METRICS[metric](sample.features, reference.features, device=device)
            if isinstance(result, metrics.KernelDistance):
                errors[metric] = uncertainty.mean_se(result.influence)
            values[metric] = result.value if isinstance(result, metrics.KernelDistance) else float(result)
        if sample.labels is not None:
            errors = {key: uncertainty.within_classes(error, sample.labels) for key, error in errors.items()}
        shown = errors if settings.errors else {}  # some are computed in any case, as they cost little
        scores = tuple(report.Score(key, value, *shown.get(key, ())[:2]) for key, value in values.items())
        line = None
        if settings.fid_infinity and len(sample.features) >= 16:
            line = metrics.fid_infinity(
                sample.features, reference.pool, reference_root=self._roots[name], device=device
            )
            if name in shown:
                line = replace(line, error=uncertainty.extrapolation_se(line, errors[name]))
        classes = self._per_class(sample, reference, balls) if settings.per_class else ()
        return Scored(report.SetReport(sample.about, scores, classes, line), errors)

    def _warn_of_splits(self, sample: Side, inception: metrics.InceptionScore) -> None:
        """Warn if a short last split or sorted samples distort the Inception Score."""
        name, size, splits = sample.about.name, self.settings.split_size, len(inception.splits)
        if splits > 1 and (last := len(sample.features) % size):
            _warn(
                f"{name}: the last of {splits} splits of the Inception Score holds {last} of {size} images and counts "
                f"as much as the others (as in 2021), which moves the score: {inception.splits[-1]:.4g} in this split, "
                f"{np.mean(inception.splits[:-1]):.4g} in the others. Score a multiple of {size} images, or choose "
                "--split_size"
            )
        labels = sample.labels if splits > 1 else None
        if labels is not None and len(set(labels)) > 1 and (np.diff(labels) >= 0).all():
            _warn(
                f"{name}: the samples are sorted by class. The Inception Score looks at consecutive "
                f"runs of {size} images and comes out low; shuffle the file"
            )
        elif inception.lowered_by_order:
            _warn(
                f"{name}: the samples look sorted, by class or otherwise: consecutive runs of {size} images are less "
                f"varied than chance. The Inception Score is {inception.score:.4g} in this order and "
                f"{inception.shuffled:.4g} in random order; shuffle the file"
            )

    def _frechet(
        self,
        name: str,
        sample: statistics.Statistics,
        reference: statistics.Statistics,
        errors: dict[str, uncertainty.Uncertainty],
    ) -> float:
        if name not in self._roots:
            self._roots[name] = metrics.covariance_root(reference, self.algebra)
        root, device = self._roots[name], self.algebra
        if self.settings.errors and sample.rows is not None and len(sample.rows) >= 4:
            errors[name] = uncertainty.frechet_se(sample, reference, reference_root=root, device=device)
        for role, stats in (("sample", sample), ("reference", reference)):
            if stats.count is not None and stats.count <= stats.dim:
                _warn(
                    f"{name}: the {role} set has {stats.count} images for {stats.dim} features. Its covariance is rank "
                    f"deficient and the distance is biased far upwards; use more than {stats.dim} images "
                    "(50,000 is the custom) or report KID instead"
                )
        return metrics.frechet_distance(sample, reference, reference_root=root, device=device)

    def _neighbours(self, sample: Side, reference: Side) -> neighbours.Neighbours | None:
        x, y, k = sample.features, reference.features, self.settings.k
        for side, scores in ((reference, "precision and recall"), (sample, "Inception Score, precision and recall")):
            if len(side.features) == 0:
                _warn(f"{side.about.name} holds no images, so {scores} cannot be computed")
                return None
        if min(len(x), len(y)) <= k:
            _warn(f"precision and recall at k = {k} need at least {k + 1} images in each set")
            return None
        if len(y) < CUSTOMARY_PR_REFERENCES:
            _warn(
                f"precision and recall rest on {len(y)} reference images; {CUSTOMARY_PR_REFERENCES} are the custom, "
                "and fewer give other numbers"
            )
        dtype = getattr(torch, self.settings.pr_dtype)
        if self._radii is None:
            self._radii = neighbours.squared_radii(y, k=k, dtype=dtype, device=self.algebra)
        return neighbours.neighbours(x, y, k=k, dtype=dtype, device=self.algebra, reference_radii=self._radii)

    def _per_class(
        self, sample: Side, reference: Side, balls: neighbours.Neighbours | None
    ) -> tuple[report.ClassScores, ...]:
        if sample.labels is None or balls is None:
            why = "has no labels (arr_1)" if sample.labels is None else "and the reference give no precision and recall"
            _warn(f"{sample.about.name} {why}, so there are no scores per class")
            return ()
        labels = _numbered_as_reference(sample, reference)
        if reference.labels is None:
            _warn(f"{reference.about.name} has no labels (arr_1), so recall, FID and KID of each class are left out")
        elif absent := sorted(set(labels.tolist()) - set(reference.labels.tolist())):
            _warn(
                f"{reference.about.name} lacks {len(absent)} of the classes of {sample.about.name} "
                f"({', '.join(map(str, absent[:5]))}{', ...' if len(absent) > 5 else ''}): recall, FID and KID of these are left "
                "out. One number must mean one class in both"
            )
        rows = []
        for label in np.unique(labels):
            in_class = labels == label
            x = sample.features[in_class]
            precision, density = balls.inside_reference[in_class].mean(), balls.ball_counts[in_class].mean() / balls.k
            row = report.ClassScores(int(label), len(x), None, float(precision), float(density))
            if reference.labels is not None:
                references = reference.labels == label
                y = reference.features[references]
                row = replace(row, references=len(y))
                if len(y):
                    row = replace(row, recall=float(balls.inside_sample[references].mean()))
                if min(len(x), len(y)) > 1:
                    distance = metrics.frechet_distance_of_features(x, y, device=self.algebra)
                    row = replace(row, fid=distance, kid=metrics.kernel_distance(x, y, device=self.algebra).value)
            rows.append(row)
        return tuple(rows)


def evaluate(
    reference: Any,
    samples: Any,
    settings: Settings | None = None,
    *,
    encoder: Encoder | None = None,
    show: Callable[[report.SetReport], None] | None = None,
    world: Place | None = None,
) -> report.Report | None:
    """Score one set of samples, or a list of sets, against a reference; None in all processes but the first.

    `reference` and each set are anything `open_images` takes: a path, an array, batches. `show` is called with each set's scores as
    soon as they are known. Progress is logged to the logger "evaluations".

    >>> evaluate("reference.npz", images_uint8).sets[0].score("FID").value
    """
    settings = settings or Settings()
    with _recorded_warnings() as recorded:
        scorer = Scorer(settings, encoder=encoder, world=world)
        # Open all sets first, so that a mistake in the last one is reported before hours of work on the others.
        many = isinstance(samples, (list, tuple))
        against, *sets = [scorer.open(source) for source in (reference, *(samples if many else [samples]))]
        scorer.read_reference(against)
        scored = []
        for images in sets:
            one = scorer.score(images)
            if one is not None:
                scored.append(one)
                if show is not None:
                    show(one.report)
    if scorer.reference is None:
        return None
    return report.Report(
        reference=scorer.reference.about,
        sets=tuple(one.report for one in scored),
        settings=_receipt(settings),
        encoder=scorer.encoder.receipt(settings),
        versions=report.versions(str(scorer.device)),
        differences=tuple(_differences(scored)) if settings.errors else (),
        warnings=tuple(recorded),
    )


def _receipt(settings: Settings) -> dict[str, Any]:
    shown = asdict(settings)
    for name in ("weights", "allow_other_weights", "shard_dir", "progress", "device", "batch_size", "metrics"):
        del shown[name]  # they change no score; the encoder's receipt has the hash of the weights
    shown["frechet"] = "float64; singular values of the product of covariance roots"
    shown["neighbours"] = "squared distances, inside when <= the distance to the k-th other point"
    shown["splits"] = "consecutive images in file order, no bias, float64, splits weigh alike"
    return shown


def _differences(scored: Sequence[Scored]) -> Iterator[report.DifferenceReport]:
    """The difference of each pair of sets in each score that has a standard error in both."""
    for i, first in enumerate(scored):
        for second in scored[i + 1 :]:
            a, b = (os.path.basename(one.report.samples.name) for one in (first, second))
            for score in first.report.scores:
                other, key = second.report.score(score.name), score.name
                if other is not None and key in first.errors and key in second.errors:
                    error, paired = uncertainty.paired_difference_se(first.errors[key], second.errors[key])
                    yield report.DifferenceReport(key, a, b, score.value - other.value, error, paired)


def _numbered_as_reference(sample: Side, reference: Side) -> np.ndarray:
    """Labels of the samples by the class numbers of the reference. In each set of folders, numbers follow the order of names."""
    assert sample.labels is not None
    names, reference_names = sample.class_names, reference.class_names
    if not names or not reference_names or names == reference_names:
        return sample.labels
    _warn(f"classes of {sample.about.name} are numbered as in {reference.about.name}, by name")
    number = {name: k for k, name in enumerate([*reference_names, *sorted(set(names) - set(reference_names))])}
    return np.array([number[name] for name in names])[sample.labels]


def _refuse_few(name: str, count: int) -> None:
    if count < 2:
        raise ValueError(f"{name} holds {count} images; scores need at least 2, better 50,000")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


@contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    """Collect all warnings for the report, whatever filters are set; then issue each again under the caller's filters."""
    texts: list[str] = []
    unique: dict[str, warnings.WarningMessage] = {}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                yield texts
            finally:
                unique = {str(one.message): one for one in caught}
                texts += unique
    finally:
        for one in unique.values():
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
