"""Made-up patients for ``sites/own_task.py``, as a German spreadsheet writes them. No patient is behind them."""

from pathlib import Path

import numpy as np

HEADER = "Nr;patient;sex;age;systolic;creatinine;outcome"


def german_rows(n: int, seed: int) -> list[str]:
    """Rows with semicolons, decimal commas, text for the outcome, and some creatinines missing; two visits for each patient."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        age, systolic, creatinine = rng.normal(60, 15), rng.normal(130, 20), abs(rng.normal(1.1, 0.4))
        risk = (age - 60) / 15 + (systolic - 130) / 20 + 2 * (creatinine - 1.1)
        cells = [
            *(str(number + 1), f"p{seed}-{number // 2}", "f" if rng.random() < 0.5 else "m"),
            *(f"{value:.1f}".replace(".", ",") for value in (np.clip(age, 18, 99), systolic)),
            "" if rng.random() < 0.1 else f"{creatinine:.2f}".replace(".", ","),
            "ill" if risk + rng.normal(0, 0.5) > 0 else "healthy",
        ]
        rows.append(";".join(cells))
    return rows


def write_german_csv(file: Path, n: int, seed: int) -> None:
    """Write the file of one hospital, as Excel does: with a byte order mark and CRLF."""
    file.write_bytes("\r\n".join([HEADER, *german_rows(n, seed), ""]).encode("utf-8-sig"))
