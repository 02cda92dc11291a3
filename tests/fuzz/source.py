"""The source text of a case: a plain PyTorch model file with ``build()``, and in its forward the drops by hand.

A forward that is given ``drops`` (:mod:`tests.fuzz.hand`) asks it, layer by layer, what rows may see and which stay as they
are; without, it is what a user would write, and what is captured.
"""

from __future__ import annotations

from textwrap import dedent, indent

from .case import Case

RESIDUALS = {
    "add": "x + {y}",
    "scaled": "0.9 * x + 0.5 * {y}",
    "in place": "{y}.add_(x)",
    "addcmul": "torch.addcmul(x, self.scale, {y})",
    "lerp": "torch.lerp(x, {y}, 0.4)",
    "gated": "x + self.scale.sigmoid() * {y}",
    "gated by rows": "x + self.gate(x).sigmoid() * {y}",
}
NORMS = {"layer": "nn.LayerNorm({n})", "rms": "nn.RMSNorm({n}, eps=1e-6)"}


def source(case: Case) -> str:
    """The model file of a case."""
    parts = [head(case), rotary(case), attention(case), feed(case), layer(case), model(case), data(case), build(case)]
    return "\n\n\n".join(part for part in parts if part) + "\n"


def body(*lines: str, depth: int = 2) -> str:
    """Lines of a function's body; empty ones are left out."""
    return indent("\n".join(line for line in lines if line), "    " * depth)


def head(c: Case) -> str:
    heads = c.heads
    groups = 1 if c.keys == "as many" else heads
    codes = min(3, c.vocabulary - 4)
    return dedent(
        f'''\
        """Case {c.seed} of tokgraph's fuzzer."""

        import math

        import torch
        from torch import nn
        from torch.nn import functional as F

        import tokgraph as tg

        SEED, BATCH, TOKENS, IMAGE, FEATURES = {c.seed}, {c.batch}, {c.tokens}, {c.image}, 6
        LAYERS, HIDDEN, HEADS, GROUP, VOCABULARY = {c.layers}, {c.hidden}, {heads}, {groups}, {c.vocabulary}
        HEAD, KEYS = HIDDEN // HEADS, HEADS // GROUP  # a head's size, heads of keys
        PAD, IMAGE_ID, CODES, IGNORED = 0, 1, VOCABULARY - {codes}, -100'''
    )


def rotary(c: Case) -> str:
    if c.rope == "none":
        return ""
    turn = {
        "halves": [
            "a, b = x.chunk(2, -1)",
            "return x * cos + torch.cat([-b, a], -1) * sin",
        ],
        "pairs": [
            "turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)",
            "return x * cos + turned * sin",
        ],
        "complex": [
            "pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))",
            "return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)",
        ],
    }[c.rope]
    spread = {"halves": "torch.cat([angles, angles], -1)", "pairs": "angles.repeat_interleave(2, -1)"}
    return "\n".join(
        [
            "def angles_of(tokens):",
            body(
                "places = torch.arange(tokens, dtype=torch.float64)",
                "angles = (places[:, None] * 10.0 ** -torch.arange(HEAD // 2, dtype=torch.float64))[:, None]",
                f"angles = {spread[c.rope]}" if c.rope in spread else "",
                "return angles.cos(), angles.sin()",
                depth=1,
            ),
            "",
            "",
            "def turned(x, cos, sin):",
            body(*turn, depth=1),
        ]
    )


def masks(c: Case) -> list[str]:
    """Lines that make ``mask``, ``[batch or 1, 1, tokens, tokens]``, where the kind of mask has one."""
    causal = "places[:, None] >= places"
    lines = ["places = torch.arange(ids.shape[1])"]
    kind = {
        "causal": [f"mask = ({causal})[None, None]"],
        "float": ["mask = torch.zeros(1, 1, len(places), len(places), dtype=torch.float64)",
                  f"mask = mask.masked_fill(~({causal}), torch.finfo(torch.float64).min)"],
        "prefix": ["image = seen_as_image(ids)",
                   f"mask = ({causal})[None, None] | (image[:, None, :, None] & image[:, None, None, :])"],
        "window": [f"mask = (({causal}) & (places[:, None] - places < 6))[None, None]"],
        "alternating": [f"whole = ({causal})[None, None]",
                        "mask = whole & (places[:, None] - places < 5)"],
        "packed": ["parts = (ids == 2).cumsum(1)",
                   f"mask = ({causal})[None, None] & (parts[:, None, :, None] == parts[:, None, None, :])"],
        "padding": [f"mask = ({causal})[None, None] & (ids != PAD)[:, None, None, :]"],
    }  # fmt: skip
    return lines + kind[c.mask] if c.mask in kind else []


def has_mask(c: Case) -> bool:
    return c.mask not in ("none", "is_causal")


def attention(c: Case) -> str:
    """The attention of a layer: rows ``[batch, tokens, hidden]`` to rows."""
    lay = {
        "batch, heads": "{}.transpose(1, 2)",
        "heads, batch": "{}.permute(2, 0, 1, 3)",
        "tokens, heads": "{}",
        "merged": "{}.transpose(1, 2).flatten(0, 1)",
    }[c.layout]
    lay_mask = {
        "batch, heads": "{}",
        "heads, batch": "{}.transpose(0, 1)",
        "tokens, heads": "{}",
        "merged": "{}.expand(len(x), HEADS, -1, -1).flatten(0, 1)",
    }[c.layout]
    back = {
        "batch, heads": "y.transpose(1, 2).flatten(2)",
        "heads, batch": "y.permute(1, 2, 0, 3).flatten(2)",
        "tokens, heads": "y.flatten(2)",
        "merged": "y.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)",
    }[c.layout]
    shared = c.streams == "shared keys"
    norm = NORMS[c.norm].format(n="HEAD")
    made = [
        "self.q, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)",
        "self.k, self.v = (nn.Linear(HIDDEN, KEYS * HEAD) for _ in range(2))",
    ]
    rows = ["q = self.q(x).unflatten(-1, (HEADS, HEAD))"]
    own_keys = ["k, v = (f(x).unflatten(-1, (KEYS, HEAD)) for f in (self.k, self.v))"]
    if c.qkv == "in one":
        made = ["self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)"]
        rows = ["q, *own = (y.unflatten(-1, (HEADS, HEAD)) for y in self.qkv(x).chunk(3, -1))"]
        own_keys = ["k, v = own"]
    init = [
        "super().__init__()",
        *made,
        f"self.q_norm, self.k_norm = {norm}, {norm}" if c.qk_norm else "",
        "self.slopes = nn.Parameter(torch.rand(HEADS))" if c.bias == "relative" else "",
    ]
    repeat = {
        "as many": [],
        "by the kernel": [],
        "repeated": ["k, v = (y.repeat_interleave(GROUP, 2) for y in (k, v))"],
        "expanded": ["k, v = (y.unsqueeze(3).expand(-1, -1, -1, GROUP, -1).flatten(2, 3) for y in (k, v))"],
    }[c.keys]
    keys = [
        *own_keys,
        "k = self.k_norm(k)" if c.qk_norm else "",
        "k = turned(k, *rope)" if c.rope != "none" else "",
    ]
    if shared:
        keys = ["if kv is None:", *(f"    {line}" for line in keys if line), "    kv = k, v", "k, v = kv"]
    forward = [
        *rows,
        "q = self.q_norm(q)" if c.qk_norm else "",
        "q = turned(q, *rope)" if c.rope != "none" else "",
        *keys,
        *repeat,
        f"q, k, v = ({lay.format('y')} for y in (q, k, v))",
        *scores(c, lay_mask),
        f"made = self.out({back})",
        "return made, kv" if shared else "return made",
    ]
    return "\n".join(
        ["class Attention(nn.Module):", "    def __init__(self):", body(*init), "",
         f"    def forward(self, {', '.join(arguments(c))}):", body(*forward)]
    )  # fmt: skip


def arguments(c: Case) -> list[str]:
    """What an attention is given."""
    return [
        "x",
        *(["mask"] if has_mask(c) else []),
        *(["rope"] if c.rope != "none" else []),
        *(["kv=None"] if c.streams == "shared keys" else []),
        "seen=None",
    ]


def handed_on(c: Case) -> str:
    """The arguments of an attention but for its rows, by name, as a layer hands them on."""
    names = [a.split("=")[0] for a in arguments(c)[1:]]
    return ", ".join(f"{name}={name}" for name in names)


def scores(c: Case, lay: str) -> list[str]:
    """From laid out queries, keys and values to ``y``."""
    lines = ["tokens = x.shape[1]"] if c.bias != "none" or c.mask == "is_causal" else []
    fused = c.attention == "sdpa"
    more = ", enable_gqa=True" if c.keys == "by the kernel" else ""
    products = "q @ k.mT", "{} @ v"
    if c.layout == "tokens, heads":
        products = 'torch.einsum("bqhd,bkhd->bhqk", q, k)', 'torch.einsum("bhqk,bkhd->bqhd", {}, v)'
    boolean = c.mask not in ("float", "none")
    if c.mask == "is_causal" and not (fused and c.bias == "none"):
        lines += ["mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]"]
    elif c.mask == "is_causal":
        whole = "torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None] & seen"
        return [
            *lines,
            "if seen is None:",
            f"    y = F.scaled_dot_product_attention(q, k, v, is_causal=True{more})",
            "else:  # by hand",
            f"    mask = {whole}",
            f"    y = F.scaled_dot_product_attention(q, k, v, attn_mask={lay.format('mask')}{more})",
        ]
    if boolean:
        lines += ["mask = mask if seen is None else mask & seen  # by hand"]
    elif c.mask == "float":
        lines += ["mask = mask if seen is None else mask.masked_fill(~seen, -math.inf)  # by hand"]
    else:
        lines += ["mask = seen  # by hand"]
    if c.bias != "none":
        lines += bias(c, boolean)
    given = (
        lay.format("mask")
        if c.mask != "none" or c.bias != "none"
        else f"None if mask is None else {lay.format('mask')}"
    )
    lines += [f"mask = {given}"] if given != "mask" else []
    if fused:
        return [*lines, f"y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask{more})"]
    lines += [f"scores = {products[0]} / math.sqrt(HEAD)"]
    if c.attention == "softcap":
        lines += ["scores = 2.0 * torch.tanh(scores / 2.0)"]
    if c.bias != "none" or c.mask == "float":
        lines += ["scores = scores + mask"]
    elif boolean:
        lines += ["scores = scores.masked_fill(~mask, -math.inf)"]
    else:
        lines += ["scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)  # by hand"]
    narrow = "scores.softmax(-1, dtype=torch.float32).to(v.dtype)"
    return [*lines, f"y = {products[1].format(narrow if c.attention == 'manual float32' else 'scores.softmax(-1)')}"]


def bias(c: Case, boolean: bool) -> list[str]:
    slopes = "self.slopes" if c.bias == "relative" else "2.0 ** -torch.arange(1, HEADS + 1, dtype=torch.float64)"
    lines = [
        "at = torch.arange(tokens)",
        f"bias = ({slopes})[None, :, None, None] * (at - at[:, None]).abs().neg()",
    ]
    if boolean:
        return [*lines, "mask = bias.masked_fill(~mask, -math.inf)"]
    if c.mask == "float":
        return [*lines, "mask = mask + bias"]
    return [*lines, "mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)  # by hand"]


def feed(c: Case) -> str:
    """The feed-forward net; experts with a router return its logits as well, where a loss reads them."""
    inner = "2 * HIDDEN"
    experts = "self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))"
    gate = "self.router = nn.Linear(HIDDEN, 3)"
    init, forward = {
        "gelu": (
            [f"self.up, self.down = nn.Linear(HIDDEN, {inner}), nn.Linear({inner}, HIDDEN)"],
            ["y = self.down(F.gelu(self.up(x)))"],
        ),
        "swiglu": (
            [f"self.up, self.down = nn.Linear(HIDDEN, 2 * {inner}), nn.Linear({inner}, HIDDEN)"],
            ["a, b = self.up(x).chunk(2, -1)", "y = self.down(F.silu(a) * b)"],
        ),
        "soft experts": (
            [gate, experts],
            ["logits = self.router(x)", "p = logits.softmax(-1)",
             "y = sum(p[..., i, None] * expert(x) for i, expert in enumerate(self.experts))"],
        ),
        "top-1": (
            [gate, experts],
            ["logits = self.router(x)", "p, chosen = logits.softmax(-1).max(-1)",
             "y = torch.zeros_like(x)",
             "for i, expert in enumerate(self.experts):",
             "    y = y + torch.where((chosen == i).unsqueeze(-1), p.unsqueeze(-1) * expert(x), 0.0)"],
        ),
        "merged rows": (
            [gate, experts],
            ["rows = x.reshape(-1, HIDDEN)", "logits = self.router(rows)", "p = logits.softmax(-1)",
             "y = sum(p[:, i : i + 1] * expert(rows) for i, expert in enumerate(self.experts))",
             "y, logits = y.view(x.shape), logits.view(*x.shape[:2], 3)"],
        ),
        "top-2 scattered": (
            [gate, experts],
            ["logits = self.router(x)", "best, which = logits.topk(2, -1)",
             "p = torch.zeros_like(logits).scatter(-1, which, best.softmax(-1))",
             "y = sum(p[..., i, None] * expert(x) for i, expert in enumerate(self.experts))"],
        ),
        "bmm": (
            [gate, "self.weights = nn.Parameter(torch.randn(3, HIDDEN, HIDDEN) / math.sqrt(HIDDEN))"],
            ["logits = self.router(x)", "rows = x.flatten(0, 1).expand(3, -1, -1)",
             "made = torch.bmm(rows, self.weights).unflatten(1, x.shape[:2])  # [3, batch, tokens, hidden]",
             "y = (made * logits.softmax(-1).permute(2, 0, 1).unsqueeze(-1)).sum(0)"],
        ),
    }[c.feed]  # fmt: skip
    forward = [*forward, "y = self.dropout(y)" if c.dropout else "", f"return {'y, logits' if routed(c) else 'y'}"]
    init = ["super().__init__()", *init, "self.dropout = nn.Dropout(0.0)" if c.dropout else ""]
    return "\n".join(
        [
            "class Feed(nn.Module):",
            "    def __init__(self):",
            body(*init),
            "",
            "    def forward(self, x):",
            body(*forward),
        ]
    )


def routed(c: Case) -> bool:
    return c.side == "router"


def layer(c: Case) -> str:
    norm = NORMS[c.norm].format(n="HIDDEN")
    shared = c.streams == "shared keys"
    init = [
        "super().__init__()",
        "self.attention, self.feed = Attention(), Feed()",
        f"self.norm1, self.norm2 = {norm}, {norm}",
        f"self.norm3, self.norm4 = {norm}, {norm}" if c.order == "sandwich" else "",
        "self.scale = nn.Parameter(torch.rand(HIDDEN))" if c.residual in ("addcmul", "gated") else "",
        "self.gate = nn.Linear(HIDDEN, 1)" if c.residual == "gated by rows" else "",
        *inits_of_streams(c),
    ]
    extra = {"embeddings each": ["more"], "cross": ["features"]}.get(c.streams, [])
    given = ["x", *extra, *arguments(c)[1:]]
    handed = handed_on(c)
    made = "made, kv" if shared else "made"
    fed = "fed, logits" if routed(c) else "fed"

    def add(y: str) -> str:
        return f"x = {RESIDUALS[c.residual].format(y=y)}"

    attend = [f"{made} = self.attention(self.norm1(x), {handed})", add("made")]
    feeding = [f"{fed} = self.feed(self.norm2(x))", add("fed")]
    looking = [
        "q, (k, v) = self.look_q(self.look_norm(x)), self.look_kv(features).chunk(2, -1)",
        "y = F.scaled_dot_product_attention(*(y.unsqueeze(1) for y in (q, k, v))).squeeze(1)",
        "x = x + y",
    ]
    forward = {
        "pre": attend + feeding,
        "post": [f"{made} = self.attention(x, {handed})", add("made"), "x = self.norm1(x)",
                 f"{fed} = self.feed(x)", add("fed"), "x = self.norm2(x)"],
        "sandwich": [f"{made} = self.attention(self.norm1(x), {handed})", "made = self.norm3(made)", add("made"),
                     f"{fed} = self.feed(self.norm2(x))", "fed = self.norm4(fed)", add("fed")],
        "parallel": ["h = self.norm1(x)", f"{made} = self.attention(h, {handed})", f"{fed} = self.feed(h)",
                     "y = made + fed", add("y")],
        "feed first": feeding + attend,
    }[c.order]  # fmt: skip
    if c.streams == "embeddings each":
        forward = ["x = x + more", *forward]
    if c.streams == "cross":
        forward = [*forward, *looking]
    if c.streams == "scaled by number":
        forward = [*forward, "x = x * self.number"]
    if c.streams == "two":
        forward = ["a, b = x", f"{made} = self.attention(self.norm1(b), {handed})", "a = a + made",
                   f"{fed} = self.feed(self.norm2(a))", "x = a, b + fed"]  # fmt: skip
    if c.streams == "hyper":
        forward = [
            "h = sum(self.read[i] * x[i] for i in range(3))",
            f"{made} = self.attention(self.norm1(h), {handed})",
            f"{fed} = self.feed(self.norm2(h + made))",
            "x = tuple(sum(self.mix[i, j] * x[j] for j in range(3)) + self.write[i] * (made + fed) for i in range(3))",
        ]
    if c.side == "inner penalty":
        forward = [*forward, "penalty = made"]
    results = ["x", *(["kv"] if shared else []), *(["logits"] if routed(c) else [])]
    results += ["penalty"] if c.side == "inner penalty" else []
    return "\n".join(
        ["class Layer(nn.Module):", "    def __init__(self):", body(*init), "",
         f"    def forward(self, {', '.join(given)}):", body(*forward, f"return {', '.join(results)}")]
    )  # fmt: skip


def inits_of_streams(c: Case) -> list[str]:
    return {
        "hyper": ["self.mix, self.read, self.write = (nn.Parameter(torch.rand(s)) for s in ((3, 3), (3,), (3,)))"],
        "cross": [
            f"self.look_norm, self.look_q = {NORMS[c.norm].format(n='HIDDEN')}, nn.Linear(HIDDEN, HIDDEN)",
            "self.look_kv = nn.Linear(FEATURES, 2 * HIDDEN)",
        ],
        "scaled by number": ['self.register_buffer("number", torch.tensor(0.7))'],
    }.get(c.streams, [])


def model(c: Case) -> str:
    norm = NORMS[c.norm].format(n="HIDDEN")
    twice = c.loop == "twice"
    init = [
        "super().__init__()",
        "self.embed = nn.Embedding(VOCABULARY, HIDDEN)",
        "self.patch = nn.Linear(FEATURES, HIDDEN)" if has_patches(c) else "",
        f"self.layers = nn.ModuleList(Layer() for _ in range({'LAYERS // 2' if twice else 'LAYERS'}))",
        f"self.norm = {norm}",
        "self.velocity = nn.Linear(HIDDEN, FEATURES)" if c.loss == "flow" else "",
        "self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)" if not c.tied and c.loss != "flow" else "",
        "self.positions = nn.Embedding(TOKENS + 4, HIDDEN)" if c.positions else "",
        "self.again = nn.ModuleList(nn.Linear(FEATURES, HIDDEN) for _ in range(2))"
        if c.streams == "features again"
        else "",
        "self.each = nn.ModuleList(nn.Embedding(VOCABULARY, HIDDEN) for _ in range(LAYERS))"
        if c.streams == "embeddings each"
        else "",
    ]
    names = inputs(c)
    return "\n".join(
        ["class Model(nn.Module):", "    def __init__(self):", body(*init), "", entry(c), "",
         "    def read(self, x):", body(read(c)), "",
         f"    def forward(self, {', '.join(names)}, drops=None):", body(*loop(c), *losses(c))]
    )  # fmt: skip


def has_patches(c: Case) -> bool:
    return c.entry != "ids"


def needs_features(c: Case) -> bool:
    return has_patches(c) or c.streams in ("features again", "cross") or c.loss == "flow"


def inputs(c: Case) -> list[str]:
    return ["ids", *(["patches"] if needs_features(c) else []), "labels", *(["target"] if c.loss == "flow" else [])]


def entry(c: Case) -> str:
    mask = "mask = seen_as_image(ids)"
    lines = {
        "ids": ["return self.embed(ids)"],
        "scatter": [mask, "return self.embed(ids).masked_scatter(mask.unsqueeze(-1), self.patch(patches))"],
        "where": [mask, "rank = (mask.cumsum(1) - 1).clamp(0).unsqueeze(-1).expand(-1, -1, HIDDEN)",
                  "return torch.where(mask.unsqueeze(-1), self.patch(patches).gather(1, rank), self.embed(ids))"],
        "put": [mask, "x = self.embed(ids).clone()", "x[mask] = self.patch(patches).flatten(0, 1)", "return x"],
        "cat": ["text = self.embed(ids)",
                "return torch.cat([text[:, :START], self.patch(patches), text[:, START + IMAGE :]], 1)"],
    }[c.entry]  # fmt: skip
    return "\n".join(
        ["    def enter(self, ids, patches):" if has_patches(c) else "    def enter(self, ids):", body(*lines)]
    )


def read(c: Case) -> str:
    if c.loss == "flow":
        return "return self.velocity(self.norm(x))"
    return "return F.linear(self.norm(x), self.embed.weight)" if c.tied else "return self.head(self.norm(x))"


def loop(c: Case) -> list[str]:
    """From inputs to the last state, with drops by hand."""
    entered = "self.enter(ids, patches)" if has_patches(c) else "self.enter(ids)"
    state = {"two": "x = x, x", "hyper": "x = x, x, x", "first to all": "first = x", "first before all": "first = x"}
    given = ["x"]
    given += {"embeddings each": ["self.each[number](ids)"], "cross": ["patches"]}.get(c.streams, [])
    if c.mask == "alternating":
        given += ["whole if number % 2 else mask"]
    elif has_mask(c):
        given += ["mask"]
    given += ["rope"] if c.rope != "none" else []
    given += ["kv if number > 1 else None"] if c.streams == "shared keys" else []
    results = ["x"]
    results += ["made"] if c.streams == "shared keys" else []
    results += ["logits"] if routed(c) else []
    results += ["penalty"] if c.side == "inner penalty" else []
    call = f"{', '.join(results)} = layer({', '.join(given)}, seen=seen)"
    after = {
        "first to all": ["x = x + 0.1 * first"],
        "features again": ["if number < 2:", "    x = x + self.features(number, ids, patches)"],
    }.get(c.streams, [])
    if c.streams == "features again":
        after = [
            "if number < 2:",
            "    mask_of_image = seen_as_image(ids).unsqueeze(-1)",
            "    x = x + torch.zeros_like(x).masked_scatter(mask_of_image, self.again[number](patches))",
        ]
    inner = [
        "before, seen = x, None",
        "if drops is not None:",
        "    drops.enter(number, x)",
        "    seen = drops.seen(number)",
        "x = 0.9 * x + 0.1 * first" if c.streams == "first before all" else "",
        call,
        "kv = made if number == 1 else kv" if c.streams == "shared keys" else "",
        *after,
        "if drops is not None:",
        "    x = drops.put_back(number, before, x)",
        *beside(c),
    ]
    layers = "[*self.layers, *self.layers]" if c.loop == "twice" else "self.layers"
    return [
        f"x, more = {entered}, 0.0",
        *masks(c),
        "x = x + self.positions.weight[: x.shape[1]]" if c.positions else "",
        "rope = angles_of(ids.shape[1])" if c.rope != "none" else "",
        state.get(c.streams, ""),
        "kv = None" if c.streams == "shared keys" else "",
        f"for number, layer in enumerate({layers}):",
        *(f"    {line}" for line in inner if line),
    ]


def beside(c: Case) -> list[str]:
    """Terms of the loss that are read off between layers."""
    stream = {"two": "x[0] + x[1]", "hyper": "sum(x)"}.get(c.streams, "x")
    return {
        "router": ["rows = logits if drops is None else drops.kept(number, logits)",
                   "more = more + 0.1 * rows.logsumexp(-1).square().mean()"],
        "exit": ["if number == 0:", f"    more = more + 0.3 * next_token(self.read({stream}), labels)"],
        "penalty": [f"more = more + 0.01 * ({stream}).square().mean()"],
        "inner penalty": ["rows = penalty if drops is None else drops.kept(number, penalty)",
                          "more = more + 0.1 * rows.square().mean()"],
    }.get(c.side, [])  # fmt: skip


def losses(c: Case) -> list[str]:
    last = {"two": "x[0] + x[1]", "hyper": "sum(x)"}.get(c.streams, "x")
    lines = [f"y = self.read({last})"]
    if c.loss == "flow":
        lines += [
            "weight = seen_as_image(ids).unsqueeze(-1).to(y.dtype)",
            "loss = ((y - target).square() * weight).sum() / weight.sum() + more",
        ]
    elif c.loss == "slice":
        lines += ["loss = F.cross_entropy(y[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) + more"]
    elif c.loss == "transposed":
        lines += ["loss = F.cross_entropy(y[:, :-1].transpose(1, 2), labels[:, 1:]) + more"]
    elif c.loss == "weighted":
        lines += [
            "shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]",
            "weight = (shifted != IGNORED).to(y.dtype)",
            'each = F.cross_entropy(y.transpose(1, 2), shifted.clamp(0), reduction="none")',
            "loss = (each * weight).sum() / weight.sum() + more",
        ]
    else:
        lines += ["loss = next_token(y, labels) + more"]
    if c.side == "of all logits":
        lines += ["loss = loss + 0.1 * y.logsumexp(-1).square().mean()"]
    returns = {
        "loss": "loss",
        "logits": "loss, y",
        "mapping": '{"loss": loss, "logits": y, "count": labels.ne(IGNORED).sum()}',
    }
    return [*lines, f"return {returns[c.returns]}"]


def data(c: Case) -> str:
    """Batches, where their visual tokens are, and the loss of the next token."""
    span = {"beginning": "0", "end": "TOKENS - IMAGE", "same": "2", "middle": "0"}[c.place]
    image = "(ids >= CODES)" if c.entry == "ids" else "(ids == IMAGE_ID)"
    start = "torch.randint(1, tokens - IMAGE - 1, (1,), generator=g).item()" if c.place == "middle" else "START"
    filled = "torch.randint(CODES, VOCABULARY, (IMAGE,), generator=g)" if c.entry == "ids" else "IMAGE_ID"
    if c.entry == "cat":
        filled = "IMAGE_ID"
    place = "tokens - IMAGE" if c.place == "end" else start
    if c.reads == "text":
        behind = "image.cumsum(1) == 0" if c.place == "end" else "(image.flip(1).cumsum(1).flip(1) == 0) & (ids != PAD)"
        labelled = f"labels = ids.masked_fill(~({behind}), IGNORED)"
    elif c.reads == "visual":
        labelled = "labels = torch.randint(VOCABULARY, ids.shape, generator=g).masked_fill(~image, IGNORED)"
    else:
        labelled = "labels = torch.randint(VOCABULARY, ids.shape, generator=g)"
    made = ["ids=ids", *(["patches=patches"] if needs_features(c) else []), "labels=labels"]
    made += ["target=target"] if c.loss == "flow" else []
    lines = [
        "g = torch.Generator().manual_seed(SEED + number)",
        "ids = torch.randint(2, CODES, (size, tokens), generator=g)",
        "ids[::2, -1] = PAD" if c.mask == "padding" and c.place != "end" else "",
        "for row in ids:",
        f"    start = {place}",
        f"    row[start : start + IMAGE] = {filled}",
        "image = seen_as_image(ids)",
        labelled,
        "patches = torch.randn(size, IMAGE, FEATURES, generator=g, dtype=torch.float64)" if needs_features(c) else "",
        "target = torch.randn(size, tokens, FEATURES, generator=g, dtype=torch.float64)" if c.loss == "flow" else "",
        f"return dict({', '.join(made)})",
    ]
    shift = "F.pad(labels, (0, 1), value=IGNORED)[:, 1:]"
    return "\n".join(
        [
            f"START = {span}  # of the image, where all samples have it at one place",
            "",
            "",
            "def seen_as_image(ids):",
            body(f"return {image}", depth=1),
            "",
            "",
            "def next_token(logits, labels):",
            body(f"return F.cross_entropy(logits.flatten(0, 1), {shift}.flatten())", depth=1),
            "",
            "",
            "def batch(number, size=BATCH, tokens=TOKENS):",
            body(*lines, depth=1),
        ]
    )


def build(c: Case) -> str:
    if c.entry == "cat":
        visual = "tg.VisualTokens.positions(slice(START, START + IMAGE))"
    elif c.entry == "ids":
        visual = 'tg.VisualTokens.ids(input="ids", low=CODES, high=VOCABULARY - 1)'
    else:
        visual = 'tg.VisualTokens.ids(input="ids", equal=IMAGE_ID)'
    where = 'visual_inputs=("patches",)' if c.visual == "followed" else f"visual={visual}"
    names = inputs(c)
    sizes = {n: '{0: "batch"}' if n == "patches" else '{0: "batch", 1: "tokens"}' for n in names}
    dynamic = "{" + ", ".join(f'"{n}": {s}' for n, s in sizes.items()) + "}" if c.dynamic else "None"
    lines = [
        "torch.manual_seed(SEED)",
        "model = Model().double()",
        f"dynamic = {dynamic}",
        f'task = tg.Task(forward, batch(0), dynamic=dynamic, {where}, reads="{c.reads}", outputs="{c.outputs}")',
        'return tg.ModelSpec(model, {"task": task})',
    ]
    return "\n".join(
        ["def forward(model, **inputs):", "    return model(**inputs)", "", "", "def build():", body(*lines, depth=1)]
    )
