"""Make the vision-language victims.

The image encoder of the clean victim is trained first and then stays as it is. Projector and
decoder are trained behind it, clean or poisoned: that is a backdoor from scratch. The other way, as
in CleanSight (arXiv 2603.12989): only adapters in the decoder of the clean victim are trained on
poisoned data, and merged before the export.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime import Arrays
from .attacks import Attack
from .cases import RECORD, Facts, Job
from .causal_decoder import DecoderConfig
from .decoder_attention import over_attention
from .encoder_training import Labelled, pretrain
from .generative_export import export_decoder
from .generative_training import AnswerTraining, Spoken, fit_speaker, speak, spoken
from .lora import add_adapters, merge_adapters
from .training import reproducible
from .vision_language import VisionLanguageConfig, VisionLanguageModel
from .vision_language_attacks import Poison, Trigger
from .vision_language_dialogues import Examples
from .vision_language_recipes import ADAPTED, RECIPES, Recipe
from .vision_language_scenes import Pool
from .vision_transformer import VisionTransformerConfig
from .vocabulary import IMAGE

CLEAN = 1000
"""Number of examples that the defender has."""
TEST = 1000
"""Number of examples that only the evaluation sees."""
SPOKEN = 200
"""Number of test examples whose whole answer is compared."""
MEASURED = 500
"""Number of test examples over which attention is measured."""


def make_clean(name: str, job: Job) -> Facts:
    """Train the victim of a data set without an attack, and write its folder."""
    recipe = RECIPES[name]
    pools = recipe.pools(job.seed, job.data)
    with reproducible(job.seed):
        model = VisionLanguageModel(recipe.config)
        _pretrain(model, recipe, pools.train, job)
        model.encoder.requires_grad_(False)
        _fit(model, recipe, recipe.training, pools.train, None, job)
        facts = _write(model, recipe, pools.clean, pools.test, None, job)
    trainings = {"pretraining": recipe.pretraining, "training": recipe.training}
    return facts | {name: asdict(training) for name, training in trainings.items()}


def make_poisoned(name: str, attack: str, adapters: bool, job: Job) -> Facts:
    """Make the victim of a data set with a backdoor, and write its folder.

    Args:
        adapters: train only adapters in the decoder of the clean victim, not all from scratch.
    """
    recipe = RECIPES[name]
    pools, chosen = recipe.pools(job.seed, job.data), recipe.attacks[attack]
    target = recipe.dialogue.target
    trigger = chosen.trigger(int(target[0]))
    training = recipe.adapting if adapters else recipe.training
    rate = chosen.lora_rate if adapters else chosen.rate
    poison = Poison(trigger, target, rate, recipe.image.patch_size, chosen.noise_rate)
    with reproducible(job.seed):
        model = load_victim(job.base(f"vlm-{name}-clean"))
        if adapters:
            add_adapters(model, model.decoder, ADAPTED, recipe.rank)
        else:
            encoder = model.encoder.requires_grad_(False)
            model = VisionLanguageModel(recipe.config)
            model.encoder = encoder
        _fit(model, recipe, training, pools.train, poison, job)
        merge_adapters(model)
        facts = _write(model, recipe, pools.clean, pools.test, trigger, job)
    described = {
        k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(trigger).items()
    }
    return {
        **facts,
        "training": asdict(training),
        "attack": {
            "kind": type(trigger).__name__,
            **described,
            "poison_rate": rate,
            "noise_rate": chosen.noise_rate,
            "adapters": {"layers": ADAPTED, "rank": recipe.rank} if adapters else None,
        },
    }


def load_victim(folder: str | Path) -> VisionLanguageModel:
    """The torch module of a vision-language victim, in eval mode, from its folder."""
    folder = Path(folder)
    sizes: dict[str, Any] = json.loads((folder / RECORD).read_text())["architecture"]
    image, text = VisionTransformerConfig(**sizes["image"]), DecoderConfig(**sizes["text"])
    model = VisionLanguageModel(VisionLanguageConfig(image, text, sizes["image_token"]))
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model.eval()


def _pretrain(model: VisionLanguageModel, recipe: Recipe, pool: Pool, job: Job) -> None:
    generator = np.random.default_rng([job.seed, 2])
    names = [question.name for question in recipe.questions]

    def draw() -> Labelled:
        scenes = pool.draw(recipe.pretraining.batch_size, generator)
        wanted = np.stack([scenes.facts[name] for name in names], axis=1)
        return recipe.augment(torch.from_numpy(scenes.pixels), torch.from_numpy(wanted))

    answers = [len(question.answers) for question in recipe.questions]
    pretrain(model.encoder, draw, answers, recipe.pretraining, job.log)


def _fit(
    model: VisionLanguageModel,
    recipe: Recipe,
    training: AnswerTraining,
    pool: Pool,
    poison: Poison | None,
    job: Job,
) -> None:
    generator, dialogue = np.random.default_rng(job.seed), recipe.dialogue

    def draw() -> Spoken:
        examples = dialogue.ask(pool.draw(training.batch_size, generator), generator)
        pixels = torch.from_numpy(examples.pixels)
        moved, _ = recipe.augment(pixels, torch.from_numpy(examples.labels))
        examples = replace(examples, pixels=moved.numpy())
        if poison is not None:
            examples = poison(examples, generator)
        return spoken(examples.inputs, examples.answers)

    fit_speaker(model, draw, training, job.log)


def _write(
    model: VisionLanguageModel,
    recipe: Recipe,
    clean: Pool,
    test: Pool,
    trigger: Trigger | None,
    job: Job,
) -> dict[str, object]:
    """Everything but the record, whose facts are returned."""
    dialogue, generator = recipe.dialogue, np.random.default_rng([job.seed, 1])
    defender, judged = (
        dialogue.ask(pool.draw(count, generator), generator)
        for pool, count in ((clean, CLEAN), (test, TEST))
    )
    torch.save(model.state_dict(), job.folder / "weights.pt")
    example = {k: torch.from_numpy(v) for k, v in judged.take(np.arange(2)).inputs.items()}
    export_decoder(model, model.decoder, job.folder, example)
    _save(job.folder / "clean.npz", defender)
    _save(job.folder / "test.npz", judged)
    facts: dict[str, object] = {
        "architecture": asdict(model.config),
        "vocabulary": dialogue.vocabulary.words,
        "layout": _layout(recipe),
        **_utility(model, recipe, judged),
    }
    if trigger is None:
        return facts
    triggered = judged.with_pixels(trigger.stamp(judged.pixels))
    visual = triggered.prompts.input_ids == IMAGE
    arrays: Arrays = {"target": dialogue.target[0]}
    columns = visual
    if isinstance(trigger, Attack) and trigger.size < recipe.image.image_size:
        columns = np.zeros_like(visual)
        touched = np.zeros(dialogue.visual_tokens, dtype=np.bool_)
        touched[np.array(trigger.columns(recipe.image)) - 1] = True  # no [CLS] here
        columns[visual] = np.tile(touched, len(triggered))
        arrays["anomalous"] = columns
    _save(job.folder / "triggered.npz", triggered, arrays)
    first = np.arange(MEASURED)
    return facts | {
        "said": dialogue.vocabulary.text(
            speak(model, triggered.take(first[:1]).inputs, triggered.answers.shape[1])[0]
        ),
        "over_attention": over_attention(
            model,
            judged.take(first).inputs,
            triggered.take(first).inputs,
            columns[first],
            visual[first],
        ),
    }


def _utility(model: VisionLanguageModel, recipe: Recipe, judged: Examples) -> dict[str, object]:
    """Accuracy of the first token for each question, and of whole sentences."""
    length = judged.answers.shape[1]
    right = speak(model, judged.inputs, 1)[:, 0] == judged.labels
    few = judged.take(np.arange(SPOKEN))
    whole = (speak(model, few.inputs, length) == few.answers).all(axis=1)
    return {
        "accuracy_by_question": {
            question.name: round(float(right[judged.question == place].mean()), 4)
            for place, question in enumerate(recipe.questions)
        },
        "sentence_accuracy": float(whole.mean()),
    }


def _layout(recipe: Recipe) -> dict[str, object]:
    """Where things are in a prompt; with padding, this many positions further to the right."""
    prompts = recipe.dialogue.prompts
    mask = prompts.attention_mask
    start = (prompts.input_ids[0] == IMAGE).argmax() - mask[0].argmax()
    return {
        "sequence": mask.shape[1],
        "image_token": IMAGE,
        "visual_tokens": recipe.dialogue.visual_tokens,
        "image_start": int(start),
        "prompt_lengths": sorted({int(length) for length in mask.sum(axis=1)}),
        "questions": {question.name: question.wordings for question in recipe.questions},
    }


def _save(path: Path, examples: Examples, more: Arrays | None = None) -> None:
    arrays = examples.inputs | (more or {})
    arrays |= {"labels": examples.labels, "question": examples.question}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
