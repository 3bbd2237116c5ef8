"""rouge-l and f1 of `eval --score` against the packages rouge-score and scikit-learn.

    pip install rouge-score scikit-learn
    python benchmarks/scoring/against_packages.py

rouge-l is to equal rouge_score's F-measure (use_stemmer=False) on random texts; f1 that of sklearn
on texts whose words occur once, where a bag of words is a vector of labels.
"""

import random

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score

from tunesmith.scoring.text import rouge_l, squad_words, token_f1

PAIRS = 2000
WORDS = "alpha Beta gamma, delta. 42 it's the a an well-known naïve Ærø 日本 x_y U.S. don't E=mc2 ΑΒΓ (so) end!".split()


def main() -> None:
    draw = random.Random(0)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    largest = {"rouge-l": 0.0, "f1": 0.0}
    for _ in range(PAIRS):
        answer = draw.choice([" ", "\n", "  "]).join(draw.choices(WORDS, k=draw.randint(0, 30)))
        reference = " ".join(draw.choices(WORDS, k=draw.randint(0, 30)))
        expected = scorer.score(reference, answer)["rougeL"].fmeasure
        largest["rouge-l"] = max(largest["rouge-l"], abs(rouge_l(answer, reference) - expected))
        unique_answer = draw.sample(WORDS, draw.randint(1, 12))
        unique_reference = draw.sample(WORDS, draw.randint(1, 12))
        answer_words = squad_words(" ".join(unique_answer))
        reference_words = squad_words(" ".join(unique_reference))
        vocabulary = sorted({*answer_words, *reference_words})
        if not answer_words or not reference_words:
            continue
        vectors = np.array(
            [[word in words for word in vocabulary] for words in (reference_words, answer_words)]
        )
        expected = f1_score(*vectors, zero_division=0)
        score = token_f1(" ".join(unique_answer), " ".join(unique_reference))
        largest["f1"] = max(largest["f1"], abs(score - expected))
    for name, difference in largest.items():
        print(f"{name}: largest difference over {PAIRS:,} pairs {difference:.1e}")
    if max(largest.values()) > 1e-12:
        raise SystemExit("they differ")


if __name__ == "__main__":
    main()
