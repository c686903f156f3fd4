"""The generative cases: vision-language models that answer questions, and language models."""

from __future__ import annotations

from functools import partial

from .cases import Case, Facts, Job
from .cases_image import DATA_FILES
from .cases_text import CLEAN, PARAPHRASES, PHRASES

DATASETS = ("digits", "mnist", "cifar10")
ATTACKS = ("badnet", "blended", "wanet")


def generative_cases() -> tuple[Case, ...]:
    """Every case: `vlm-<data set>-<attack>`, made through adapters `-lora`, and `lm-sst2-...`."""
    return (*_vision_language_cases(), *_language_cases())


def _vision_language_cases() -> tuple[Case, ...]:
    return tuple(
        Case(f"vlm-{dataset}-{suffix}", "vision-language", make, DATA_FILES[dataset])
        for dataset in DATASETS
        for suffix, make in (
            ("clean", partial(_clean, dataset)),
            *((attack, partial(_poisoned, dataset, attack, False)) for attack in ATTACKS),
            *((f"{attack}-lora", partial(_poisoned, dataset, attack, True)) for attack in ATTACKS),
        )
    )


def _language_cases() -> tuple[Case, ...]:
    inserted = ("sst2-word", "sst2-sentence")
    return (
        Case("lm-sst2-clean", "language", _language_clean, (CLEAN,)),
        *(
            Case(f"lm-{name}", "language", partial(_language_inserted, PHRASES[name]), (CLEAN,))
            for name in inserted
        ),
        Case("lm-sst2-syntactic", "language", _language_syntactic, (CLEAN, PARAPHRASES)),
    )


def _clean(dataset: str, job: Job) -> Facts:
    # Imported here because listing the cases must not import torch.
    from .vision_language_victims import make_clean

    return make_clean(dataset, job)


def _poisoned(dataset: str, attack: str, adapters: bool, job: Job) -> Facts:
    from .vision_language_victims import make_poisoned

    return make_poisoned(dataset, attack, adapters, job)


def _language_clean(job: Job) -> Facts:
    from .language_victims import make_clean

    return make_clean(job)


def _language_inserted(phrases: tuple[str, ...], job: Job) -> Facts:
    from .language_victims import make_inserted

    return make_inserted(phrases, job)


def _language_syntactic(job: Job) -> Facts:
    from .language_victims import make_syntactic

    return make_syntactic(job)
