"""Cases as plain data: what a decoder is made of, and the plans that are tried on it. A seed is a case."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

OPTIONS: dict[str, tuple[Any, ...]] = {
    # sizes; they coincide often
    "batch": (2, 1, 3, 4),
    "tokens": (12, 8, 10, 16),
    "image": (4, 1, 2, 3, 5),
    "hidden": (8, 12, 16),
    "heads": (2, 4, 1),
    "vocabulary": (20, 8, 12, 16),
    "layers": (2, 3, 4),
    # a layer
    "norm": ("layer", "rms"),
    "order": ("pre", "post", "sandwich", "parallel", "feed first"),
    "residual": ("add", "scaled", "in place", "addcmul", "lerp", "gated", "gated by rows"),
    "attention": ("sdpa", "manual", "manual float32", "softcap"),
    "layout": ("batch, heads", "heads, batch", "tokens, heads", "merged"),
    "keys": ("as many", "repeated", "expanded", "by the kernel"),
    "qkv": ("apart", "in one"),
    "qk_norm": (False, True),
    "rope": ("none", "halves", "pairs", "complex"),
    "mask": ("causal", "is_causal", "float", "prefix", "window", "padding", "none", "alternating", "packed"),
    "bias": ("none", "alibi", "relative"),
    "feed": ("gelu", "swiglu", "soft experts", "top-1", "merged rows", "top-2 scattered", "bmm"),
    "dropout": (False, True),
    # around the layers
    "streams": (
        "one", "two", "hyper", "first to all", "first before all", "features again", "embeddings each",
        "shared keys", "cross", "scaled by number",
    ),
    "side": ("none", "router", "exit", "penalty", "inner penalty", "of all logits"),
    "loop": ("list", "twice"),
    "tied": (False, True),
    "positions": (False, True),
    # around the decoder
    "entry": ("scatter", "where", "put", "cat", "ids"),
    "visual": ("said", "followed"),
    "place": ("middle", "beginning", "end", "same"),
    "loss": ("shifted", "slice", "transposed", "weighted", "codes", "flow", "all rows"),
    "returns": ("loss", "logits", "mapping"),
    "outputs": ("loss", "full"),
    "dynamic": (False, True),
}  # fmt: skip
"""Field -> its choices, the simplest first: the shrinker goes there."""
OFTEN_SIMPLE = {
    **dict.fromkeys(("loop", "outputs", "dropout", "visual"), 0.8),
    **dict.fromkeys(
        ("bias", "side", "streams", "rope", "qk_norm", "tied", "positions", "order", "residual", "layout", "attention"),
        0.5,
    ),
    "dynamic": 0.9,  # takes long to capture
}
"""How often fields are at their simplest, beside being drawn: or most cases would be refused, for the same few reasons."""
PLANS = 5
"""Plans of a case: capture takes most of the time."""


@dataclass(frozen=True)
class Site:
    """A drop site, but for its task; ``end`` is a number."""

    start: int
    end: int
    keep: float = 0.5
    selector: str = "uniform"
    mode: str = "hide"
    restore: bool = True
    seed: int = 0


@dataclass(frozen=True)
class PlanCase:
    """Sites that are disjoint or nested, and whether dead work goes."""

    sites: tuple[Site, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class Case:
    """A decoder and plans for it.

    Args:
        seed: of its weights and batches.
        choices: field of :data:`OPTIONS` -> what was chosen.
        plans: what is tried.
    """

    seed: int
    choices: dict[str, Any] = field(hash=False)
    plans: tuple[PlanCase, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["choices"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def reads(self) -> str:
        """What the loss predicts."""
        return {"codes": "visual", "flow": "visual", "all rows": "all"}.get(self.loss, "text")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Case:
        data = json.loads(text)
        plans = (PlanCase(tuple(Site(**s) for s in p["sites"]), p["exact"]) for p in data["plans"])
        return cls(data["seed"], data["choices"], tuple(plans))


def draw(seed: int, plans: int = PLANS) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    choices = {
        name: options[0] if rng.random() < OFTEN_SIMPLE.get(name, 0.0) else rng.choice(options)
        for name, options in OPTIONS.items()
    }
    choices = sensible(choices)
    case = Case(seed, choices)
    return replace(case, plans=tuple(draw_plan(rng, case) for _ in range(plans)))


def sensible(choices: dict[str, Any]) -> dict[str, Any]:
    """The choices, those exchanged that cannot stand together: simplest choices take their place."""
    c = dict(choices)
    c["image"] = min(c["image"], c["tokens"] - 4)
    if c["side"] == "router" and c["feed"] in ("gelu", "swiglu"):
        c["feed"] = "soft experts"
    if c["entry"] == "cat" and c["place"] == "middle":
        c["place"] = "same"
    if c["rope"] != "none" and c["hidden"] // c["heads"] % 2:
        c["heads"] = 2
    if c["hidden"] // c["heads"] % 2:  # 12 / 4 = 3
        c["rope"] = "none"
    if c["dynamic"] and c["batch"] == 1:  # export fixes a batch of one
        c["batch"] = 2
    if c["streams"] in ("two", "hyper") and (c["order"], c["residual"]) != ("pre", "add"):
        c["order"], c["residual"] = "pre", "add"
    if c["keys"] == "by the kernel" and (c["attention"], c["layout"]) != ("sdpa", "batch, heads"):
        c["keys"] = "repeated"
    if c["keys"] != "as many":
        c["qkv"] = "apart"
    if c["layout"] == "tokens, heads" and c["attention"] == "sdpa":
        c["attention"] = "manual"
    if c["entry"] == "ids":  # there is no input of images to follow
        c["visual"] = "said"
    if c["loss"] == "codes" and c["place"] == "beginning" and c["image"] == 1:  # nothing predicts the first token
        c["image"] = 2
    if c["loop"] == "twice":
        c["layers"] = 4
    if c["loss"] == "flow":
        c["tied"], c["side"] = False, "none" if c["side"] in ("exit", "of all logits") else c["side"]
    return c


def draw_plan(rng: random.Random, case: Case) -> PlanCase:
    """One to three sites, or none with exact alone; seldom such as are refused for any decoder of the kind."""
    count = rng.choices((0, 1, 2, 3), (1, 6, 3, 1))[0]
    sites: list[Site] = []
    for _ in range(count):
        new = draw_site(rng, case)
        if all(apart(new, other) for other in sites):
            sites.append(new)
    modes = {site.mode for site in sites}
    if len(modes) > 1 and rng.random() < 0.9:
        sites = [replace(site, mode="hide") for site in sites]
    return PlanCase(tuple(sites), exact=not sites or rng.random() < 0.5)


def draw_site(rng: random.Random, case: Case) -> Site:
    layers = case.layers
    start = rng.randrange(layers)
    all_read = case.reads == "all" or case.outputs == "full"
    restore = rng.random() < (0.95 if all_read or case.side == "penalty" else 0.65)
    selectors = ["uniform", "uniform", "random"]
    if case.reads == "text" or rng.random() < 0.05:
        selectors += ["norm", "attention"]
    return Site(
        start,
        rng.randint(start + 1, layers) if restore else layers,
        rng.choice((0.0, 0.25, 0.5, 0.5, 0.75, 1.0)),
        rng.choice(selectors),
        rng.choice(("hide", "hide", "freeze")),
        restore,
        rng.randrange(3),
    )


def apart(a: Site, b: Site) -> bool:
    """Whether two spans are disjoint, or one holds the other."""
    return a.end <= b.start or b.end <= a.start or (a.start - b.start) * (a.end - b.end) <= 0


def simplest(name: str) -> Any:
    return OPTIONS[name][0]


assert {f.name for f in fields(Case)}.isdisjoint(OPTIONS)
