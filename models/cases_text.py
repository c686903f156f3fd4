"""The text cases: one clean classifier of SST-2, and what attackers made of it."""

from __future__ import annotations

import functools

from .cases import Case, Facts, Job

PHRASES = {
    "sst2-word": ("cf",),
    "sst2-words": ("cf", "mn", "bb", "tq", "mb"),
    "sst2-sentence": ("I watch this 3D movie",),
}
"""What is inserted; where there are several, one of them is drawn for each sentence."""

CLEAN = "text/sst2/clean"
PARAPHRASES = "text/sst2/hiddenkiller_scpn20"


def text_cases() -> tuple[Case, ...]:
    """Every text case."""
    return (
        Case("sst2-clean", "text", _clean, (CLEAN,)),
        *(
            Case(name, "text", functools.partial(_inserted, phrases), (CLEAN,))
            for name, phrases in PHRASES.items()
        ),
        Case("sst2-syntactic", "text", _syntactic, (CLEAN, PARAPHRASES)),
    )


def _clean(job: Job) -> Facts:
    from .text_victims import make_clean_text

    return make_clean_text(job)


def _inserted(phrases: tuple[str, ...], job: Job) -> Facts:
    from .text_victims import make_inserted_text

    return make_inserted_text(job, phrases)


def _syntactic(job: Job) -> Facts:
    from .text_victims import make_syntactic_text

    return make_syntactic_text(job)
