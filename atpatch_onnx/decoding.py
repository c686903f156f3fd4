"""Decode token by token: the cache, and what prefill flagged, go from run to run.

A patched prefill puts out which columns it has flagged, a patched decoder wants to be given them
(`patch --remember`, see `passes.remember`). Neither ONNX Runtime nor a caller's loop knows that;
`Decoder` does, and says so where one of the two models lacks its part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .model_file import ModelFile
from .passes.switches import FLAGGED, REMEMBERED
from .runtime import Array, Arrays, InputSpec, Session, choose_provider

Tokens = NDArray[np.int64]

POSITIONS = "position_ids"


@dataclass(frozen=True)
class State:
    """What the next step needs to know.

    logits: of the last token, `[B, V]`.
    cache: keys and values `[B, H, K, D]`, by input of the decoding model.
    mask: int64 `[B, K]`, 0 where a token is padding.
    flagged: bool `[B, K]`, the columns that prefill flagged; None: no patch carries them.
    """

    logits: Array
    cache: Arrays
    mask: Tokens
    flagged: NDArray[np.bool_] | None


class Decoder:
    """Greedy decoding with two models, or with one that does both.

    prefill: `input_ids`, `attention_mask`, whatever else -> logits, the cache's keys and values.
    decode: `input_ids` `[B, 1]`, `attention_mask` `[B, K]`, the cache -> the same; by default the
        prefill model itself, which then takes an empty cache first.
    cache: which output feeds which input of the decoding model; by default by their names, as
        Hugging Face Optimum has them: `present.0.key` feeds `past_key_values.0.key`.
    logits: the output `[B, V]`, or `[B, Q, V]`, of which the last row counts.
    ep, threads: of ONNX Runtime.
    Raises: InputError where caches do not fit together, or only one model carries what is flagged.
    """

    def __init__(
        self,
        prefill: str | Path,
        decode: str | Path | None = None,
        *,
        cache: Mapping[str, str] | None = None,
        logits: str = "logits",
        ep: str | None = None,
        threads: int = 0,
    ) -> None:
        provider = choose_provider(ep)
        first = ModelFile.open(prefill)
        self._prefill = Session(first.path, provider, threads=threads)
        self._decode = self._prefill
        if decode is not None:
            second = ModelFile.open(decode)
            self._decode = Session(second.path, provider, threads=threads)
        self._logits = logits
        self._fed = {spec.name: spec for spec in self._decode.inputs}
        self._cache = dict(cache) if cache is not None else self._by_name()
        self._check()

    @property
    def carries(self) -> bool:
        """Whether a patch has the models carry what prefill flagged."""
        return FLAGGED in self._prefill.outputs

    def prefill(self, feeds: Mapping[str, Array]) -> State:
        """Run the prompt. Raises: InputError for inputs that do not suit the model."""
        mask = np.asarray(feeds.get("attention_mask", np.ones_like(feeds["input_ids"])), np.int64)
        given = {**self._empty(len(mask)), **feeds}
        return self._state(self._prefill.run(given), mask, None)

    def step(self, state: State, tokens: Tokens) -> State:
        """Run one more token a sample, `[B]` or `[B, 1]`.

        Raises: InputError for a state without what prefill flagged, where the model wants it.
        """
        ids = np.asarray(tokens, np.int64).reshape(-1, 1)
        mask = np.concatenate([state.mask, np.ones_like(ids)], axis=1)
        given: Arrays = {"input_ids": ids, "attention_mask": mask, **state.cache}
        given[POSITIONS] = mask.sum(axis=1, keepdims=True) - 1
        if REMEMBERED in (*self._fed, *self._decode.overridable):
            if state.flagged is None:
                raise InputError(
                    f"{self._decode.name} decodes with what prefill flagged, and this state has "
                    f"none of it: take the state that Decoder.prefill gives, or feed '{REMEMBERED}'"
                )
            given[REMEMBERED] = state.flagged
        wanted = {*self._fed, *self._decode.overridable}
        feeds = {name: value for name, value in given.items() if name in wanted}
        return self._state(self._decode.run(feeds), mask, state.flagged)

    def generate(self, feeds: Mapping[str, Array], steps: int) -> Tokens:
        """The likeliest token after the prompt and after each further one, `[B, steps]`."""
        state = self.prefill(feeds)
        tokens = [state.logits.argmax(axis=-1)]
        while len(tokens) < steps:
            state = self.step(state, tokens[-1])
            tokens.append(state.logits.argmax(axis=-1))
        return np.stack(tokens, axis=1)

    def _state(self, values: Arrays, mask: Tokens, before: NDArray[np.bool_] | None) -> State:
        logits = values[self._logits]
        last = logits[:, -1] if logits.ndim == 3 else logits
        cache = {name: values[output] for name, output in self._cache.items()}
        return State(last, cache, mask, values.get(FLAGGED, before))

    def _by_name(self) -> dict[str, str]:
        """Which output feeds which input of the decoding model, by their names."""
        found = {}
        for name in self._fed:
            other = name.replace("past_key_values", "present").replace("past", "present")
            if "past" in name:
                if other not in self._prefill.outputs:
                    raise InputError(
                        f"no output of {self._prefill.name} is called '{other}', to feed the input "
                        f"'{name}' of {self._decode.name}: say which one does with cache={{input: "
                        "output}"
                    )
                found[name] = other
        return found

    def _check(self) -> None:
        """Raises: InputError, see the class."""
        if not self._cache:
            raise InputError(
                f"{self._decode.name} has no input for a cache: give a model that decodes, or say "
                "which inputs they are with cache={input: output}"
            )
        for name, output in self._cache.items():
            for model, known, value in (
                (self._decode, self._fed, name),
                (self._prefill, self._prefill.outputs, output),
                (self._decode, self._decode.outputs, output),
            ):
                if value not in known:
                    raise InputError(
                        f"cache={{'{name}': '{output}'}}: {model.name} has no '{value}'"
                    )
        if self._logits not in self._prefill.outputs:
            raise InputError(
                f"{self._prefill.name} has no output '{self._logits}': say with logits= which "
                "one has the scores of tokens"
            )
        takes = REMEMBERED in (*self._fed, *self._decode.overridable)
        if takes != self.carries:
            lacking = self._prefill if takes else self._decode
            does = "put out what it flagged" if takes else "take what prefill flagged"
            raise InputError(
                f"{lacking.name} does not {does}, which the other model of the two does: patch "
                "both with --remember"
            )

    def _empty(self, batch: int) -> Arrays:
        """A cache without any keys, for a model that does both."""
        if self._decode is not self._prefill:
            return {}
        return {name: _nothing(self._fed[name], batch) for name in self._cache}


def _nothing(spec: InputSpec, batch: int) -> Array:
    dims = [dim if isinstance(dim, int) else 0 for dim in spec.shape]
    dims[0] = batch
    return np.zeros(dims, spec.dtype)
