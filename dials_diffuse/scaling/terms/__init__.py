"""Terms of the scaling model, one module for each.

A term says which axes it has for an experiment, who owns its parameters, and what is
expected of them; everything else follows from that. ``docs/scaling_terms.md`` shows how to
add one.
"""

from __future__ import annotations

from dials_diffuse.scaling.terms.absorption import ABSORPTION
from dials_diffuse.scaling.terms.decay import DECAY
from dials_diffuse.scaling.terms.detector import DETECTOR
from dials_diffuse.scaling.terms.offset import OFFSET
from dials_diffuse.scaling.terms.resolution import RESOLUTION
from dials_diffuse.scaling.terms.scale import SCALE
from dials_diffuse.scaling.terms.term import Role, Term

# In the order in which they are refined and logged.
TERMS: dict[str, Term] = {
    term.name: term for term in (SCALE, DETECTOR, DECAY, ABSORPTION, OFFSET, RESOLUTION)
}


def register(term: Term) -> None:
    """Add a term to those of the model.

    Raises:
        ValueError: There is one of that name.
    """
    if term.name in TERMS:
        raise ValueError(f"the scaling model already has a term named {term.name}")
    TERMS[term.name] = term


def terms_phil() -> str:
    """The PHIL blocks of all terms."""
    return "\n".join(
        f"{term.name}\n  .help = {term.help!r}\n{{\n{term.phil}\n}}"
        for term in TERMS.values()
    )
