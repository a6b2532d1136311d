"""Rebuild movie_reviews.csv and tweets.csv from the source distribution of vaderSentiment 0.5.

pip download --no-deps --no-binary :all: vaderSentiment==0.5
python examples/data/make_snippets.py vaderSentiment-0.5.zip
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

SDIST_SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"

LONGEST = 12  # words of a review
WEAKEST = 0.3  # of its mean rating, on the scale from -4 to 4: below it the raters disagree
NEUTRAL, STRONG = 0.5, 1.0  # a tweet is rated nearer to 0 than the one, or beyond the other


def ratings(sdist: Path, name: str) -> list[tuple[str, float, str]]:
    """(id, mean rating, text) of every snippet of a kind in the source distribution."""
    content = sdist.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SDIST_SHA256:
        raise SystemExit(f"{sdist}: got SHA-256 {found}, expected {SDIST_SHA256}")
    with zipfile.ZipFile(io.BytesIO(content)) as outer:
        with tarfile.open(fileobj=io.BytesIO(outer.read(ARCHIVE))) as inner:
            file = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8").splitlines()
    rows = []
    for line in lines:
        number, rating, text = line.split("\t")
        rows.append((number, float(rating), " ".join(text.split())))
    return rows


def of_review(rating: float, text: str) -> str | None:
    """Its label; None for one that is left out."""
    if len(text.split()) > LONGEST or abs(rating) < WEAKEST:
        return None
    return "positive" if rating > 0 else "negative"


def of_tweet(rating: float, text: str) -> str | None:
    if abs(rating) <= NEUTRAL:
        return "neutral"
    if abs(rating) < STRONG:
        return None
    return "positive" if rating > 0 else "negative"


def make(source: Path, name: str, target: str, label: Callable[[float, str], str | None]) -> None:
    seen = set()
    path = Path(__file__).with_name(target)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "rating", "label", "text"])
        for number, rating, text in ratings(source, name):
            found = label(rating, text)
            if found is None or text in seen:
                continue
            seen.add(text)
            writer.writerow([number, f"{rating:.2f}", found, text])
    print(f"{len(seen)} rows in {path}")


def main() -> None:
    source = Path(sys.argv[1])
    make(source, "movieReviewSnippets", "movie_reviews.csv", of_review)
    make(source, "tweets", "tweets.csv", of_tweet)


if __name__ == "__main__":
    main()
