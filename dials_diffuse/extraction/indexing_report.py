"""Which crystals were reindexed: for the log and for the report."""

from __future__ import annotations

import logging
from typing import Any, Sequence

import numpy as np

from dials.util import tabulate
from dials_diffuse.extraction.reindexing import SURE, Indexing
from dials_diffuse.util.text import shortened

logger = logging.getLogger("dials.diffuse.extract")

MAX_ROWS = 20


def log_indexing(indexing: Indexing) -> None:
    """Log the settings and what was done about them, with a table of the crystals."""
    if indexing.untold:
        logger.info(
            "The Bragg peaks of %d crystals do not tell the indexing settings related "
            "by %s apart: the spots are too weak, or this is a symmetry of the crystals",
            len(indexing.units),
            "; ".join(map(str, indexing.untold)),
        )
    if not indexing.is_telling:
        return
    counts = np.bincount(indexing.choice, minlength=len(indexing.operators))
    logger.info(
        "Indexing settings of %d crystals, by their Bragg peaks (evidence %.1f standard "
        "deviations on average): %s",
        len(indexing.units),
        indexing.evidence.mean(),
        ", ".join(f"{n} by {op}" for n, op in zip(counts, indexing.operators)),
    )
    _log_table(indexing)
    if indexing.reindexed:
        logger.info(
            "Reindexed %d experiments to the setting of the others",
            len(indexing.reindexed),
        )
    if indexing.ambiguous:
        logger.warning(
            "Warning: the setting of %d experiments is in doubt (less than %g standard "
            "deviations): %s. They are %s",
            len(indexing.ambiguous),
            SURE,
            shortened(indexing.ambiguous),
            {
                "keep": "kept as they are; see indexing.in_doubt",
                "best": "set as seems best",
                "leave_out": "left out",
            }[indexing.in_doubt],
        )


def _log_table(indexing: Indexing) -> None:
    """The crystals, or the first few of them; all are in the debug log."""
    rows = [
        (shortened(unit, 3), int(n), str(indexing.operators[choice]), evidence, applied)
        for unit, n, choice, evidence, applied in zip(
            indexing.units,
            indexing.n_contrasts,
            indexing.choice,
            indexing.evidence,
            (str(indexing.operators[i]) for i in indexing.applied),
        )
    ]
    header = ("experiment", "reflections", "best setting", "evidence", "applied")
    table = tabulate(rows[:MAX_ROWS], header, floatfmt=".1f")
    logger.info(table)
    if len(rows) > MAX_ROWS:
        logger.info("(%d more)", len(rows) - MAX_ROWS)
        logger.debug(tabulate(rows, header, floatfmt=".1f"))


def indexing_record(indexing: Indexing, identifiers: Sequence[str]) -> dict[str, Any]:
    """The settings and what was done about them, for a JSON file.

    Args:
        indexing: The settings.
        identifiers: Of the experiments that its units count.
    """
    record = indexing.as_dict()
    for crystal in record["crystals"]:
        crystal["identifiers"] = [identifiers[i] for i in crystal["experiments"]]
    return {
        **record,
        "is_telling": indexing.is_telling,
        "in_doubt": indexing.in_doubt,
        "sure_from": SURE,
        "n_reindexed": len(indexing.reindexed),
        "n_ambiguous": len(indexing.ambiguous),
        "n_left_out": len(indexing.left_out),
    }


def least_sure(record: dict[str, Any], n: int = MAX_ROWS) -> list[dict[str, Any]]:
    """The crystals of an ``indexing_record`` of which the setting is least sure.

    Args:
        record: The record.
        n: The most crystals.
    """
    return sorted(record["crystals"], key=lambda c: c["evidence"])[:n]
