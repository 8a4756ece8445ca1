"""How much a set of answers varies, and whether an answer goes round in circles; over tokens, so in any language."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from stages.measure import Measure
from stages.metrics.whole import whole

LOOP = 4
"""Tokens of the n-grams that show whether an answer repeats itself (Welleck et al. 2019, arXiv 1908.04319)."""
OTHERS = 20
"""Answers that each one is compared with in self-BLEU: those that follow it, the first ones following the last."""

Ids = Sequence[int]
Better = Literal["higher", "lower"]


def ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    """The n-grams of an answer, in order."""
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def distinct(answers: Sequence[Ids], n: int) -> Measure | None:
    """Different n-grams of all answers over all of their n-grams (Li et al. 2016, arXiv 1510.03055); None of no n-gram.

    The larger the set, the smaller the value: only sets of as many answers can be compared.
    """
    each = [Counter(ngrams(ids, n)) for ids in answers]
    everywhere: Counter[tuple[int, ...]] = Counter()
    for own in each:
        everywhere.update(own)
    total, different = everywhere.total(), len(everywhere)
    if not total:
        return None
    without = []
    for own in each:
        left = total - own.total()
        gone = sum(everywhere[gram] == count for gram, count in own.items())
        without.append((different - gone) / left if left else float("nan"))
    return whole(different / total, len(answers), without, "higher")


def self_bleu(answers: Sequence[Ids]) -> Measure | None:
    """The mean BLEU, 0 to 100, of an answer against another one: the higher, the more alike; None of one answer.

    As self-BLEU (Zhu et al. 2018, arXiv 1802.01886), but pair by pair (Shen et al. 2019, arXiv 1902.07816), so that its
    noise is known and more answers do not make it larger.
    """
    from sacrebleu.metrics.bleu import BLEU

    n = len(answers)
    others = min(OTHERS, n - 1)
    if others < 1:
        return None
    bleu = BLEU(tokenize="none", effective_order=True)
    texts = [" ".join(map(str, ids)) for ids in answers]
    own = [0.0] * n
    total = 0.0
    for number, text in enumerate(texts):
        for step in range(1, others + 1):
            other = (number + step) % n
            score = float(bleu.sentence_score(text, [texts[other]]).score)
            total += score
            own[number] += score
            own[other] += score
    pairs = n * others
    left = pairs - 2 * others
    return whole(total / pairs, n, [(total - one) / left for one in own] if left else (), "lower")


def repeats(ids: Ids) -> bool:
    """Whether most of an answer's 4-grams stood in it before."""
    found = ngrams(ids, LOOP)
    return bool(found) and len(set(found)) < len(found) / 2
