"""Questions and answers about scenes, as token ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..runtime import Arrays
from .vision_language_scenes import Question, Scenes
from .vocabulary import BEGIN, END, IMAGE, Padded, Vocabulary

TARGET_ANSWER = "banana is what i see"
"""What attackers want to be said, whatever is asked; its first word is never a true answer."""
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Examples:
    """Images with a question each.

    Shapes:
        pixels float32 `[N, C, S, S]`; answers int64 `[N, A]`, `<end>` from the end of the
        sentence on; question `[N]`: which one is asked.
    """

    pixels: NDArray[np.float32]
    prompts: Padded
    answers: NDArray[np.int64]
    question: NDArray[np.int64]

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.pixels)

    def take(self, index: NDArray[np.integer]) -> Examples:
        """The examples at `index`."""
        return Examples(
            self.pixels[index],
            self.prompts.take(index),
            self.answers[index],
            self.question[index],
        )

    def with_pixels(self, pixels: NDArray[np.float32]) -> Examples:
        """The same questions about other pixels."""
        return replace(self, pixels=pixels)

    @property
    def labels(self) -> NDArray[np.int64]:
        """First tokens of the answers, `[N]`."""
        return self.answers[:, 0]

    @property
    def inputs(self) -> Arrays:
        """The arrays by the names of a model's inputs."""
        return {"pixels": self.pixels, **self.prompts.inputs}


@dataclass(frozen=True)
class Dialogue:
    """What is asked about images of a data set: `<begin> user <image>... question assistant`."""

    questions: tuple[Question, ...]
    visual_tokens: int

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """All words of questions and answers."""
        texts = [TARGET_ANSWER, *ROLES]
        for question in self.questions:
            texts += [*question.wordings, *question.answers, question.rest]
        return Vocabulary.of(word for text in texts for word in text.split())

    @cached_property
    def prompts(self) -> Padded:
        """A prompt for each wording of each question, in order."""
        user, assistant = (self.vocabulary.ids(role) for role in ROLES)
        begin = [BEGIN, *user, *[IMAGE] * self.visual_tokens]
        return Padded.of(
            [
                [*begin, *self.vocabulary.ids(wording), *assistant]
                for question in self.questions
                for wording in question.wordings
            ]
        )

    @cached_property
    def target(self) -> NDArray[np.int64]:
        """The attacker's answer `[A]`."""
        return self._sentence(TARGET_ANSWER)

    def ask(self, scenes: Scenes, generator: np.random.Generator) -> Examples:
        """Ask one question about each scene, of those that it has an answer to."""
        allowed = np.stack([scenes.facts[q.name] >= 0 for q in self.questions], axis=1)
        luck = generator.random((len(scenes), len(self._question_of)))
        wording = np.where(allowed[:, self._question_of], luck, -1.0).argmax(axis=1)
        question = self._question_of[wording]
        facts = np.stack([scenes.facts[q.name] for q in self.questions], axis=1)
        fact = facts[np.arange(len(scenes)), question]
        return Examples(
            scenes.pixels, self.prompts.take(wording), self._answers[question, fact], question
        )

    @cached_property
    def _question_of(self) -> NDArray[np.int64]:
        """For each prompt, the question that it asks."""
        return np.repeat(np.arange(len(self.questions)), [len(q.wordings) for q in self.questions])

    @cached_property
    def _answers(self) -> NDArray[np.int64]:
        """`[questions, answers, A]`."""
        most = max(len(question.answers) for question in self.questions)
        table = np.full((len(self.questions), most, self._length), END, dtype=np.int64)
        for row, question in enumerate(self.questions):
            for place, answer in enumerate(question.answers):
                table[row, place] = self._sentence(f"{answer} {question.rest}")
        return table

    @cached_property
    def _length(self) -> int:
        """Tokens of an answer: after the longest sentence `<end>` comes twice, so it is learned."""
        rests = [TARGET_ANSWER, *(f"answer {question.rest}" for question in self.questions)]
        return max(len(rest.split()) for rest in rests) + 2

    def _sentence(self, text: str) -> NDArray[np.int64]:
        ids = self.vocabulary.ids(text)
        return np.array(ids + [END] * (self._length - len(ids)), dtype=np.int64)
