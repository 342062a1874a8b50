"""Unigram and trigram baselines over token ids, for comparison with the model's perplexity."""

import numpy as np

_EM_ROUNDS = 12


class Counts:
    """How often each n-gram of one order occurs."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys, self.counts = np.unique(keys, return_counts=True)

    def of(self, keys: np.ndarray) -> np.ndarray:
        index = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[index] == keys, self.counts[index], 0)


def _keys(ids: np.ndarray, order: int, vocab: int) -> np.ndarray:
    """Key of the n-gram ending at each position from order - 1 on."""
    wide = ids.astype(np.int64)
    keys = np.zeros(len(ids) - order + 1, np.int64)
    for i in range(order):
        keys = keys * vocab + wide[i : len(ids) - order + 1 + i]
    return keys


class Trigram:
    """Trigram, bigram, unigram and uniform estimates mixed by weights fitted on text not
    counted."""

    def __init__(self, ids: np.ndarray, held_back: np.ndarray, vocab: int) -> None:
        self.vocab = vocab
        self.orders = [Counts(_keys(ids, n, vocab)) for n in (1, 2, 3)]
        self.total = len(ids)
        self.mix = np.full(4, 0.25)
        self._fit(self._estimates(held_back))

    def _estimates(self, ids: np.ndarray) -> np.ndarray:
        """[positions from 2 on, 4] probabilities of each estimate."""
        one, two, three = (
            order.of(_keys(ids, n, self.vocab))
            for n, order in zip((1, 2, 3), self.orders, strict=True)
        )
        one, two = one.astype(float), two.astype(float)
        trigram = three / np.maximum(two[:-1], 1)
        bigram = two[1:] / np.maximum(one[1:-1], 1)
        uniform = np.full(len(trigram), 1 / self.vocab)
        return np.stack((trigram, bigram, one[2:] / self.total, uniform), axis=1)

    def _fit(self, estimates: np.ndarray) -> None:
        for _ in range(_EM_ROUNDS):
            shares = estimates * self.mix
            self.mix = (shares / shares.sum(1, keepdims=True)).mean(0)

    def losses(self, ids: np.ndarray) -> np.ndarray:
        """Natural-log loss of ids[2:]."""
        return -np.log(self._estimates(ids) @ self.mix)

    def unigram_losses(self, ids: np.ndarray) -> np.ndarray:
        return -np.log(
            (self.orders[0].of(_keys(ids, 1, self.vocab))[2:] + 1) / (self.total + self.vocab)
        )
