"""r2 and rmse of a submission on the houses of labels.csv, as JSON."""

import argparse
import csv
import json
import math
import sys


def read(path: str) -> dict[str, float]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = {"Id", "SalePrice"} - set(rows.fieldnames or ())
        if missing:
            sys.exit(f"{path} has no column {', '.join(sorted(missing))}")
        try:
            found = {row["Id"].strip(): float(row["SalePrice"]) for row in rows}
        except (TypeError, ValueError) as error:
            sys.exit(f"{path}: a price is no number: {error}")
    wrong = next((house for house, price in found.items() if not math.isfinite(price)), None)
    if wrong is not None:
        sys.exit(f"{path}: the price of house {wrong} is {found[wrong]}")
    return found


parser = argparse.ArgumentParser()
parser.add_argument("--submission_file", required=True)
submitted = read(parser.parse_args().submission_file)
labels = read("labels.csv")
absent = [house for house in labels if house not in submitted]
if absent:
    sys.exit(f"{len(absent)} houses of test.csv are not in the submission, the first is {absent[0]}")
mean = sum(labels.values()) / len(labels)
squared = sum((submitted[house] - price) ** 2 for house, price in labels.items())
total = sum((price - mean) ** 2 for price in labels.values())
print(json.dumps({"r2": 1 - squared / total, "rmse": math.sqrt(squared / len(labels))}))
