"""Arithmetic word problems with exact answers, as JSONL for `grpo_lora.py --data`.

    python benchmarks/word_problems.py 1200 > word_problems.jsonl    # rows; the same every time

One or two steps of addition, subtraction or multiplication over small numbers, in varied words.
Every problem is distinct.
"""

import json
import random
import sys

NAMES = "Ana Ben Chloe Dan Eva Femi Gia Hugo Ines Jon Kira Leo Mia Nils Omar Pia Quin Rosa".split()
NAMES += ["Sam", "Tara"]
THINGS = "apples books coins pens cards shells stickers marbles stamps cookies".split()
TEMPLATES = (
    ("{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", lambda a, b, c: a + b),
    ("{n} has {s} {t} and gives {b} of them away. How many {t} are left?", lambda a, b, c: a),
    ("{n} has {c} bags with {a} {t} in each. How many {t} is that in all?", lambda a, b, c: a * c),
    (
        "{n} has {a} {t}, finds {b} more and then loses {c}. How many {t} does {n} have?",
        lambda a, b, c: a + b - c,
    ),
    (
        "{n} buys {c} boxes of {a} {t} and already had {b} {t}. How many {t} does {n} have?",
        lambda a, b, c: a * c + b,
    ),
)
SHOWN = (  # three worked examples, as earlier turns of the chat: what an answer looks like
    ("Max has 8 eggs and buys 5 more. How many eggs does Max have now?", "8 + 5 = 13. #### 13"),
    ("Zoe has 4 boxes with 6 keys in each. How many keys is that in all?", "4 * 6 = 24. #### 24"),
    (
        "Abe has 9 hats, finds 3 more and then loses 2. How many hats does Abe have?",
        "9 + 3 = 12, 12 - 2 = 10. #### 10",
    ),
)


def problems(count: int, seed: int = 0) -> list[dict]:
    rng, found = random.Random(seed), {}
    while len(found) < count:
        text, answer = rng.choice(TEMPLATES)
        a, b, c = rng.randint(2, 20), rng.randint(2, 20), rng.randint(2, 6)
        names = {"n": rng.choice(NAMES), "t": rng.choice(THINGS)}
        words = text.format(**names, a=a, b=b, c=min(c, a + b), s=a + b)
        found[words] = str(answer(a, b, min(c, a + b)))
    turns = []
    for question, reply in SHOWN:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": reply})
    last = lambda question: [{"role": "user", "content": question}]
    return [{"prompt": turns + last(q), "answer": answer} for q, answer in found.items()]


if __name__ == "__main__":
    for row in problems(int(sys.argv[1])):
        print(json.dumps(row))
