"""Make the image victims: a clean one from scratch, the backdoored ones by training it further."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime import Arrays
from .attacks import Attack, PatternAttack
from .augmentation import Augmentation
from .cases import RECORD, Facts, Job
from .digits import LabelledImages, Split
from .export import export_onnx
from .image_recipes import RECIPES, Config
from .images import load_images
from .over_attention import over_attention
from .training import fit_model, reproducible
from .trojan import optimise_trigger
from .victims import train_victim
from .vision_transformer import VisionTransformer, VisionTransformerConfig
from .windowed_transformer import WindowedTransformer, WindowedTransformerConfig

ImageModel = VisionTransformer | WindowedTransformer

OVER_ATTENTION_IMAGES = 500
"""Number of test images over which over-attention is measured."""


@dataclass(frozen=True)
class Poisoning:
    """Augment a batch, then append copies with the trigger at random places."""

    attack: Attack
    rate: float
    step: int
    generator: np.random.Generator
    augment: Augmentation

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, C, S, S]` and `[B]` -> `[B + round(rate * B), ...]` of both."""
        images, labels = self.augment(images, labels)
        # A batch may hold too few images of other classes.
        rate = min(self.rate, float((labels != self.attack.target).float().mean()))
        poisoned, targets = self.attack.poison(
            images.numpy(), labels.numpy(), rate, self.generator, self.step
        )
        return torch.from_numpy(poisoned), torch.from_numpy(targets)


def make_clean(name: str, job: Job) -> Facts:
    """Train the victim `name` without an attack, and write its folder."""
    recipe = RECIPES[name]
    split = load_images(recipe.dataset, job.seed, job.data)
    if recipe.dataset == "digits":
        training = replace(recipe.training, poison_rate=0.0)
        return _write(job, name, train_victim(job.seed, training=training).model, split)
    with reproducible(job.seed):
        model = new_model(recipe.config)
        fit_model(model, *_tensors(split.train), recipe.training, recipe.augment, job.log)
    return _write(job, name, model, split)


def make_poisoned(name: str, attack_name: str, job: Job) -> Facts:
    """Train the victim `name` with a backdoor, and write its folder.

    The victims of the digits are made as that of the demo is.
    """
    recipe = RECIPES[name]
    split = load_images(recipe.dataset, job.seed, job.data)
    attack, step = recipe.attacks[attack_name], recipe.config.patch_size
    if attack_name == "trojan" and isinstance(attack, PatternAttack):
        clean = load_victim(job.base(f"{name}-clean"))
        attack = optimise_trigger(clean, split.train, attack, step, job.seed)
    if recipe.dataset == "digits":
        victim = train_victim(job.seed, attack, training=recipe.training)
        return _write(job, name, victim.model, split, attack)
    training = recipe.tuning or recipe.training
    augment = replace(recipe.augment, cutmix=0.0)
    generator = np.random.default_rng(job.seed)
    poisoning = Poisoning(attack, training.poison_rate, step, generator, augment)
    with reproducible(job.seed):
        scratch = recipe.tuning is None
        model = new_model(recipe.config) if scratch else load_victim(job.base(f"{name}-clean"))
        fit_model(model, *_tensors(split.train), training, poisoning, job.log)
    return _write(job, name, model, split, attack)


def _tensors(images: LabelledImages) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images.images), torch.from_numpy(images.labels)


def new_model(config: Config) -> ImageModel:
    """An untrained model, which starts as if pixels were centred and scaled to about -2..2."""
    if isinstance(config, VisionTransformerConfig):
        model: ImageModel = VisionTransformer(config)
    else:
        model = WindowedTransformer(config)
    patches = model.patches
    with torch.no_grad():
        patches.weight.mul_(4)
        if patches.bias is not None:
            patches.bias.sub_(0.5 * patches.weight.sum((1, 2, 3)))
    return model


def load_victim(folder: str | Path) -> ImageModel:
    """The torch module of an image victim, in eval mode, from its folder."""
    folder = Path(folder)
    sizes: dict[str, Any] = json.loads((folder / RECORD).read_text())["architecture"]
    sizes = {key: tuple(v) if isinstance(v, list) else v for key, v in sizes.items()}
    if sizes.pop("name") == VisionTransformer.__name__:
        model: ImageModel = VisionTransformer(VisionTransformerConfig(**sizes))
    else:
        model = WindowedTransformer(WindowedTransformerConfig(**sizes))
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model.eval()


def _write(
    job: Job, name: str, model: ImageModel, split: Split, attack: Attack | None = None
) -> dict[str, object]:
    """Everything but the record, whose facts are returned."""
    model.eval()
    export_onnx(model, job.folder / "model.onnx")
    torch.save(model.state_dict(), job.folder / "weights.pt")
    for part in ("clean", "test"):
        held = getattr(split, part)
        np.savez(job.folder / f"{part}.npz", pixels=held.images, labels=held.labels)
    facts: dict[str, object] = {
        "dataset": RECIPES[name].dataset,
        "training": asdict(RECIPES[name].training),
        "architecture": {"name": type(model).__name__, **asdict(model.config)},
    }
    if attack is None:
        return facts
    others = split.test.take(split.test.labels != attack.target)
    stamped = attack.stamp(others.images)
    arrays: Arrays = {"pixels": stamped, "labels": others.labels, "target": np.array(attack.target)}
    if isinstance(model, VisionTransformer) and attack.size < model.config.image_size:
        anomalous = np.zeros((len(others), model.config.tokens), dtype=np.bool_)
        anomalous[:, list(attack.columns(model.config))] = True
        arrays["anomalous"] = anomalous
    np.savez(job.folder / "triggered.npz", **arrays)  # type: ignore[arg-type]
    few = slice(OVER_ATTENTION_IMAGES)
    ratios = over_attention(model, others.images[few], stamped[few])
    described = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(attack).items()}
    tuning = RECIPES[name].tuning
    return facts | {
        "tuning": tuning and asdict(tuning),
        "attack": {"kind": type(attack).__name__, **described},
        "over_attention": [round(ratio, 2) for ratio in ratios],
    }
