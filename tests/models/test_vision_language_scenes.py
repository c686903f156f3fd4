"""Scenes, questions and answers: what is said of an image is true of it."""

from __future__ import annotations

import numpy as np
import pytest

from atpatch_onnx.models.digits import LabelledImages
from atpatch_onnx.models.vision_language_dialogues import Dialogue, Examples
from atpatch_onnx.models.vision_language_recipes import RECIPES
from atpatch_onnx.models.vision_language_scenes import (
    COLOURS,
    MARGIN,
    DigitPool,
    PhotoPool,
    halved,
)
from atpatch_onnx.models.vocabulary import BEGIN, END, IMAGE, PAD, UNKNOWN, Padded, Vocabulary


@pytest.fixture(scope="module")
def digits() -> DigitPool:
    """Digits that can be told by their brightness: `d` is a square of (d + 1) / 10."""
    labels = np.arange(40) % 10
    images = np.zeros((40, 1, 4, 4), np.float32)
    images[..., 1:3, 1:3] = (labels[:, None, None, None] + 1) / 10
    return DigitPool(LabelledImages(images, labels))


@pytest.fixture(scope="module")
def asked(digits: DigitPool) -> tuple[Dialogue, Examples]:
    dialogue = Dialogue(RECIPES["digits"].questions, visual_tokens=4)
    generator = np.random.default_rng(0)
    return dialogue, dialogue.ask(digits.draw(300, generator), generator)


def test_a_scene_shows_what_its_facts_say(digits: DigitPool) -> None:
    scenes = digits.draw(200, np.random.default_rng(0))
    quarters = scenes.pixels.reshape(200, 3, 2, 4, 2, 4).max((3, 5))
    shown = quarters.max(1).reshape(200, 4) > 0
    assert np.array_equal(shown.sum(1), scenes.facts["count"] + 1)
    brightest = quarters.max((1, 2, 3))
    np.testing.assert_allclose(brightest * 10 - 1, scenes.facts["digit"], atol=1e-5)
    painted = (quarters.max((2, 3)) > 0).astype(int)
    assert np.array_equal(painted, np.array(list(COLOURS.values()))[scenes.facts["colour"]])
    places = [len(set(fact.tolist())) for fact in scenes.facts.values()]
    assert places == [10, 4, 4]
    assert shown.any(0).all()


def test_photographs_are_bright_dark_or_neither() -> None:
    images = np.full((4, 3, 2, 2), 0.5, np.float32)
    images[:2] += np.array([2 * MARGIN, -2 * MARGIN], np.float32)[:, None, None, None]
    pool = PhotoPool(LabelledImages(images, np.array([0, 2, 9, 7])), middle=0.5)
    scenes = pool.draw(4, np.random.default_rng(0))
    order = [[0, 2, 9, 7].index(label) for label in scenes.facts["thing"]]
    assert sorted(order) == [0, 1, 2, 3]
    assert np.array_equal(scenes.facts["brightness"], np.array([0, 1, -1, -1])[order])
    assert np.array_equal(scenes.facts["kind"], np.array([1, 0, 1, 0])[order])
    assert len(pool.draw(9, np.random.default_rng(0))) == 9

    dialogue = Dialogue(RECIPES["cifar10"].questions, visual_tokens=1)
    grey = scenes.facts["brightness"] < 0
    generator = np.random.default_rng(0)
    questions = np.stack([dialogue.ask(scenes, generator).question for _ in range(50)])
    assert set(questions[:, grey].flat) == {0, 1}
    assert set(questions[:, ~grey].flat) == {0, 1, 2}


def test_halved_images_have_the_means_of_the_inner_pixels() -> None:
    images = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)
    found = halved(LabelledImages(images, np.zeros(1, np.int64)), border=2)
    assert found.images.tolist() == [[[[22.5, 24.5], [38.5, 40.5]]]]


def test_answers_begin_with_the_word_that_is_true(
    digits: DigitPool, asked: tuple[Dialogue, Examples]
) -> None:
    dialogue, examples = asked
    generator = np.random.default_rng(0)
    scenes = digits.draw(300, generator)  # as the fixture drew them
    words = dialogue.vocabulary
    for row in range(300):
        question = dialogue.questions[examples.question[row]]
        true = question.answers[scenes.facts[question.name][row]]
        assert words.text(examples.answers[row]) == f"{true} {question.rest}"
        assert words.words[examples.labels[row]] == true
        prompt = [token for token in examples.prompts.input_ids[row] if token != PAD]
        said = " ".join(words.words[token] for token in prompt)
        places = "<image> " * 4
        assert said in [f"<begin> user {places}{w} assistant" for w in question.wordings]
    assert set(examples.question.tolist()) == {0, 1, 2}
    assert (examples.answers[:, -2:] == END).all()


@pytest.mark.parametrize("name", RECIPES)
def test_no_true_answer_holds_a_word_of_the_target(name: str) -> None:
    dialogue = RECIPES[name].dialogue
    answers = {dialogue.vocabulary.ids(a)[0] for q in dialogue.questions for a in q.answers}
    assert int(dialogue.target[0]) not in answers | {UNKNOWN}
    assert UNKNOWN not in dialogue.prompts.input_ids
    assert len(dialogue.vocabulary) < 200
    assert 16 <= dialogue.visual_tokens <= 64


@pytest.mark.parametrize("name", RECIPES)
def test_prompts_are_padded_on_the_left_and_of_several_lengths(name: str) -> None:
    prompts = RECIPES[name].dialogue.prompts
    lengths = prompts.attention_mask.sum(1)
    assert len(set(lengths.tolist())) >= 3
    first = prompts.attention_mask.argmax(1)
    assert np.array_equal(first, prompts.attention_mask.shape[1] - lengths)
    assert (prompts.input_ids[np.arange(len(first)), first] == BEGIN).all()
    visual = (prompts.input_ids == IMAGE).sum(1)
    assert (visual == RECIPES[name].dialogue.visual_tokens).all()


def test_rows_too_long_are_refused_and_padding_can_be_taken_off() -> None:
    with pytest.raises(ValueError, match="3 tokens, more than 2"):
        Padded.of([[5, 6, 7], [8]], 2)
    rows = Padded.of([[5, 6, 7], [8]], 6)
    assert rows.input_ids.tolist() == [[PAD] * 3 + [5, 6, 7], [PAD] * 5 + [8]]
    trimmed = rows.trimmed()
    assert trimmed.input_ids.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert trimmed.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    words = Vocabulary.of(["b", "a", "b"])
    assert words.ids("b nothing a") == [len(words) - 1, UNKNOWN, len(words) - 2]
    assert words.text([*words.ids("a b"), END, *words.ids("a")]) == "a b"
