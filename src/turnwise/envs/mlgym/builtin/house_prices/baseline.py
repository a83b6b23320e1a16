"""Living area times the price a square foot that is usual in the neighbourhood."""

import csv
from collections import defaultdict
from statistics import median


def read(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


train, test = read("data/train.csv"), read("data/test.csv")
rates: defaultdict[str, list[float]] = defaultdict(list)
for house in train:
    rate = float(house["SalePrice"]) / float(house["Gr_Liv_Area"])
    rates[house["Neighborhood"]].append(rate)
    rates[""].append(rate)
usual = {name: median(values) for name, values in rates.items()}
with open("submission.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["Id", "SalePrice"])
    for house in test:
        writer.writerow([house["Id"], usual.get(house["Neighborhood"], usual[""]) * float(house["Gr_Liv_Area"])])
