# SPDX-License-Identifier: Apache-2.0
"""A name cannot lie: shape suffixes agree with the letters beside them."""

import ast
import collections
import functools
from pathlib import Path

import pytest

from suffixes import GENERIC, Comparison, Module, lies

ROOT = Path(__file__).parents[2]
LEAST = 60  # comparisons whose other side is written out in letters

HEADER = """
def f(x_BTD, y_BTF, w_DF, *, mask_BT=None): pass
class Routes:
    share_BTA: object
    choice_BTA: object
class MLP:
    def __init__(self):
        self.up = matrix(key, (d, f), "DF", 0.1)
        self.bias = vector(0.0, (d,), "D")
"""
# By kind: a line of a method of MLP, as it is right, and changed into lies.
PLANTED = {
    "contraction's operand": {
        'y = einsum("BTD,DF->BTF", x_BTD, w_DF)': [
            'y = einsum("BTD,DF->BTF", x_BTF, w_DF)',
            'y = einsum("BTD,DF->BTF", x_BTD, w_FD)',
            'y = einsum("BTD,DF->BTF", x_BTD, routes.w_EDF)',
            'y = einsum("BTD,DF->BTF", x_BTD.astype(dtype), w_FD.astype(dtype))',
            'y = einsum("BTD,DF->BTF", x_BTD[:, 0], w_DF)',
            'y = einsum("BTD,DF->BTF", *(x_BTD, w_FD))',
            'both = x_BTD, w_FD\n        y = einsum("BTD,DF->BTF", *both)',
        ],
        'y = project(subscripts="BTD,DF->BTF", x=x_BTD, w=w_DF)': [
            'y = project(subscripts="BTD,DF->BTF", x=x_BTF, w=w_DF)',
            'y = project("BTD,DF->BTF", x_BTD, w=w_FD)',
        ],
        'y = project_all("BTD,DF,DN->BTF,BTN", x_BTD, (w_DF, w_DN))': [
            'y = project_all("BTD,DF,DN->BTF,BTN", x_BTD, (w_DN, w_DF))',
            'y = project_all("BTD,DF,DN->BTF,BTN", x_BTF, (w_DF, w_DN))',
        ],
        'how = "BTD,DF->BTF"\n        y = project(how, x_BTD, w_DF)': [
            'how = "BTD,DF->BTF"\n        y = project(how, x_BTF, w_DF)',
        ],
        'y = project(f"BTD,{letters}->BTV", x_BTD, w_VD)': [
            'y = project(f"BTD,{letters}->BTV", x_BTF, w_VD)',
        ],
    },
    "contraction's operand, a parameter": {
        'y = project("BTD,DF->BTF", x_BTD, self.up[...])': [
            'y = project("BTF,FD->BTD", x_BTF, self.up[...])',
            'y = project("BTD,D->BTD", x_BTD, self.up[...])',
        ],
        'y = project_all("BTD,DF,DF->BTF,BTF", x_BTD, (self.up[...], w_DF))': [
            'y = project_all("BTD,DF,FD->BTF,BTD", x_BTD, (w_DF, self.up[...]))',
        ],
    },
    "contraction's result": {
        'y_BTF = einsum("BTD,DF->BTF", x, w)': [
            'y_BTD = einsum("BTD,DF->BTF", x, w)',
            'y_BF = einsum("BTD,DF->BTF", x, w)',
        ],
        'q_BTN, k_BTK = project_all("BTD,DN,DK->BTN,BTK", x, weights)': [
            'q_BTN, k_BTN = project_all("BTD,DN,DK->BTN,BTK", x, weights)',
        ],
        'y_BTV = project(f"BTD,{letters}->BTV", x_BTD, w)': [
            'y_BTD = project(f"BTD,{letters}->BTV", x_BTD, w)',
        ],
    },
    "block's parameter": {
        'run = local(lambda x_BTD, w: x_BTD, ("BTD", letters), "BTD")': [
            'run = local(lambda x_BTD, w: x_BTD, ("BTF", letters), "BTD")',
            'run = local(lambda x_BT, y_BTD: y, ("BTD", "BT"), "BTD")',
        ],
        'def block(x_BT): pass\n        run = sharding.local(block, ("BT",), "B")': [
            'def block(x_BT): pass\n        run = sharding.local(block, ("TB",), "B")',
            'def block(x_BT): pass\n        run = local(block, ("T",), "B")',
        ],
    },
    "block's argument": {
        'y = local(block, ("BTD", letters, "BT"), "B")(x_BTD, w, t_BT)': [
            'y = local(block, ("BTD", letters, "BT"), "B")(x_BT, w, t_BT)',
            'y = local(block, ("BTD", letters, "BT"), "B")(x_BTD, w, t_B)',
            'y = local(block, ("BTD", "BT"), "B")(*(x_BTD, t_B))',
            'run = local(block, ("BTD", w, "BT"), "B")\n        run(t_BT, w, x_BTD)',
        ],
    },
    "block's argument, a parameter": {
        'y = local(block, ("BTD", "D"), "BTD")(x_BTD, self.bias[...])': [
            'y = local(block, ("BTD", "H"), "BTD")(x_BTD, self.bias[...])',
        ],
    },
    "block's result": {
        'y_BTD = local(block, ("BT",), "BTD")(x_BT)': [
            'y_BTF = local(block, ("BT",), "BTD")(x_BT)',
        ],
        'y_B, z_T = local(block, ("BT",), ("B", "T"))(x_BT)': [
            'y_T, z_B = local(block, ("BT",), ("B", "T"))(x_BT)',
        ],
        'run = local(lambda x_BT: x_BT, ("BT",), "BT")': [
            'run = local(lambda x_BT: x_BT, ("BT",), "B")',
            'run = local(lambda x_BT: psum(x_BT, "t") if t else x_BT, ("BT",), "B")',
        ],
    },
    "placement": {
        'y = sharding.constrain(x_BTD, "BTD")': [
            'y = sharding.constrain(x_BTD, "BTF")',
            'y = sharding.reduce_to_storage(dw_VD, "DV")',
        ],
    },
    "placement, a parameter": {
        'y = sharding.gather(self.up[...], "DF", dtype)': [
            'y = sharding.gather(self.up[...], "FD", dtype)',
        ],
    },
    "placement's result": {
        'y_DF = gather(w, "DF", dtype)': ['y_FD = gather(w, "DF", dtype)'],
    },
    "shape of a parameter": {
        'self.down = matrix(key, (f, d), "FD", std)': [
            'self.down = matrix(key, (f, d), "DF", std)',
            'self.down = matrix(key, (f, d), "FDH", std)',
            'self.down = vector(0.0, (n, h), "KH")',
        ],
    },
    "size": {
        "b, t, d = x_BTD.shape": ["b, t = x_BTD.shape", "b, d, t = x_BTD.shape"],
        "(b, t), d = x_BT.shape, w": ["(t, b), d = x_BT.shape, w"],
    },
    "argument": {
        "f(x_BTD, y_BTF, w_DF, mask_BT=m_BT)": [
            "f(y_BTF, y_BTF, w_DF)",
            "f(x_BTD, y_BTF, mask_BT=m_B)",
            "f(*(x_BTD, y_BTF), w_FD)",
            "f(x_BTD, w_DF=w_FD)",
            "f(x_BTD[:, 0], y_BTF)",
        ],
        "Routes(s_BTA, c_BTA)": ["Routes(s_BTA, c_BT)"],
        "f(x_BSD)": ["f(x_BD)"],  # of the positions of keys, as many as of queries
    },
    "assignment": {
        "m_BT1 = m_BT[:, :, None]": ["m_B1T = m_BT[:, :, None]", "m_BT = x_BTD[0]"],
        "y_BTD = x_BTD.astype(dtype)": ["y_BTF = x_BTD.astype(dtype)"],
        "y_B1 = x_BT": ["y_T = x_BT"],
        "y_T = x_BT[-1]": ["y_B = x_BT[-1]"],
        "y_BT1 = x_BT[..., None]": ["y_B1T = x_BT[..., None]"],
    },
}


@functools.cache
def comparisons() -> dict[str, list[Comparison]]:
    """Returns all that can be compared in the three packages, by module."""
    modules = {}
    for package in ("sharding", "pallas_kernels", "jaxllm"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = Module(ast.parse(path.read_text()))
    assert [f"{n}: {w}" for n, m in modules.items() for w in m.unknown_letters()] == []
    return {name: list(m.comparisons(modules)) for name, m in modules.items()}


def test_suffixes_agree_with_the_letters_beside_them():
    wrong = [
        f"{module}:{one}"
        for module, each in comparisons().items()
        for one in each
        if not one.agrees
    ]
    assert wrong == []


def test_enough_is_compared_of_every_kind():
    kinds = [one.kind for each in comparisons().values() for one in each]
    counted = collections.Counter(kinds)
    print(f"{len(kinds)} comparisons: {dict(counted.most_common())}")
    assert counted.keys() == PLANTED.keys()
    written = {"argument", "assignment", "size"}  # other names
    assert len([kind for kind in kinds if kind not in written]) >= LEAST, counted
    assert counted["contraction's operand, a parameter"] >= 8, counted
    assert counted["block's parameter"] + counted["block's argument"] >= 30, counted


def test_a_function_that_is_allowed_two_letters_is_there():
    text = "".join(path.read_text() for path in ROOT.glob("[jp]*/**/*.py"))
    assert [name for name in GENERIC if f"def {name}(" not in text] == []


def planted(line: str) -> str:
    return f"{HEADER}    def run(self, x):\n        {line}\n"


@pytest.mark.parametrize("kind", PLANTED)
def test_the_truth_is_compared_and_a_planted_lie_is_found(kind):
    for truth, others in PLANTED[kind].items():
        found = list(Module(ast.parse(planted(truth))).comparisons({}))
        assert kind in [one.kind for one in found], truth
        assert lies(planted(truth)) == []
        for lie in others:
            assert lie != truth
            assert any(f", {kind}, is " in said for said in lies(planted(lie))), lie


def test_what_an_imported_function_takes_is_compared():
    folder = {
        "kernels": "from kernels.op import attend",
        "kernels.op": "def attend(q_BTNH, *, lse_BNT): pass",
        "one": "import kernels\nkernels.attend(x_BTNH, lse_BNT=l_BTN)",
        "two": "from kernels import attend, op\nattend(x_BTD)\nop.attend(x_B)",
    }
    modules = {name: Module(ast.parse(source)) for name, source in folder.items()}
    found = {
        name: [one.what for one in module.comparisons(modules) if not one.agrees]
        for name, module in modules.items()
    }
    assert found["one"] == ["lse_BNT=l_BTN"]
    assert found["two"] == ["q_BTNH=x_BTD", "q_BTNH=x_B"]


@pytest.mark.parametrize(
    "lie",
    [
        'y = einsum("BTX,XF->BTF", x, w)',
        "x_BTQ = f()",
        "def f(x_BZ): pass",
        "x_B2 = f()",
    ],
)
def test_a_letter_that_is_not_in_the_alphabet_is_found(lie):
    assert lies(lie)


@pytest.mark.parametrize(
    "truth",
    [
        "y = project(subscripts, x_BTD, w)",
        'y_B1F = einsum("BTD,DF->BTF", x_B1D, w_DF)',
        'x = einsum("lij,lkj->lik", x, x)',
        "key_11S = f()",
        "FLOAT_MAX = MAX_BYTES",
        "y_BT = x_BTD[rows, columns]",
        "for x_BT in rows: y = local(block, (*(axes for _ in rows), 'B'), 'B')(x_BT)",
        'ins = "BT"\nif a:\n    ins = "BTD"\ny = local(block, (ins,), "B")(x_BTD)',
        "rows, width = x_BTD.reshape(-1, d).shape",
    ],
)
def test_what_cannot_be_known_is_let_through(truth):
    assert not lies(truth)
