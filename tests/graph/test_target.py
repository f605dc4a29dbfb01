"""Targets: parsing, matching as PEFT matches, blocks, roles, and what a misspelt target is told."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from lorafx.errors import UsageError
from lorafx.graph.blocks import Blocks
from lorafx.graph.nearest import nearest
from lorafx.graph.target import Candidate, Item, Selector, Target, role_of
from lorafx.models.roles import ROLES


@dataclass(frozen=True)
class Use:
    """A candidate without a program around it."""

    module: str
    kind: str = "linear"
    role: str = "other"
    block: int | None = None


def use(module: str, kind: str = "linear") -> Use:
    """The candidate a capture would give: role from the path, block from its first number."""
    number = re.search(r"\.(\d+)\.", module)
    return Use(module, kind, role_of(module, kind), int(number[1]) if number else None)


BERT = [
    use("bert.embeddings.word_embeddings", "embedding"),
    *(
        use(f"bert.encoder.layer.{block}.{name}")
        for block in range(12)
        for name in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ),
    use("bert.pooler.dense"),
    use("classifier"),
]


def taken(spec: str | list[str], candidates: list[Use] = BERT, **rest: Target | Blocks | None) -> list[str]:
    selector = Selector(Target.parse(spec), **rest)  # pyright: ignore[reportArgumentType]
    return [c.module for c in candidates if selector.decide(c, 11) is None]


# --- what an item means ---


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("all-linear", "all-linear"),
        ("All-Linear", "all-linear"),
        ("query", "name"),
        ("attention.output.dense", "name"),
        ("name:query", "name"),
        ("role:attn.*", "role"),
        ("role:ffn.{up,down}", "role"),
        ("*.query", "glob"),
        ("layer.?.query", "glob"),
        ("bert.encoder.layer.{0..5}.output.dense", "glob"),
        ("model.layers.*.q_proj", "glob"),
        ("glob:classifier", "glob"),
        (".*query", "regex"),
        (r"bert\.pooler", "regex"),
        ("a|b", "regex"),
        ("x[01]", "regex"),
        ("^query$", "regex"),
        ("q+", "regex"),
        (".*(query,value){1,2}", "regex"),
        ("re:query", "regex"),
        ("re:a,b", "regex"),
    ],
)
def test_kind_of_an_item(text: str, kind: str) -> None:
    target = Target.parse(text)
    assert [item.kind for item in target.items] == [kind]
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("all-linear", 73),
        ("query", 12),
        ("dense", 37),
        ("output.dense", 24),
        ("attention.output.dense", 12),
        ("uery", 0),
        ("bert.pooler.dense", 1),
        ("query,value", 24),
        (" query , value ", 24),
        (["query", "value", "query"], 24),
        (["query", r".*\.layer\.1\..*"], 17),
        ("*.layer.{0..5}.attention.*", 24),
        ("*.layer.{0..10..2}.*.query", 6),
        ("*.layer.{10..0..2}.*.query", 6),
        ("*.layer.{0..1,11}.*.{query,key}", 6),
        ("*.layer.?.*.query", 10),
        ("encoder.layer.*", 0),
        ("role:ffn.down", 12),
        ("role:attn.*", 48),
        ("role:{head,embedding}", 2),
        (r".*\.(query|value)", 24),
        ("re:query", 0),
        ("re:.*query", 12),
    ],
)
def test_what_a_spec_names(spec: str | list[str], count: int) -> None:
    assert len(taken(spec)) == count


def test_a_star_crosses_dots_and_a_dot_is_a_dot() -> None:
    target = Target.parse("a*c.d")
    assert target.match(Use("a.b.c.d")) is not None
    assert target.match(Use("a.b.cxd")) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "target '', column 1: an item is empty; remove the comma or name a module"),
        (
            "query,,value",
            "target 'query,,value', column 7: an item is empty; remove the comma or name a module",
        ),
        ([], "target []: names nothing; use 'all-linear' for every linear layer"),
        (7, "target 7: give a string or a list of strings"),
        (["query", 7], "target ['query', 7]: give a string or a list of strings"),
        ("query value", "target 'query value', column 6: ' ' cannot stand here in a module name"),
        ("query, .key", "target 'query, .key', column 8: '.' cannot stand here in a module name"),
        ("output..dense", "target 'output..dense', column 7: '.' cannot stand here in a module name"),
        ("query.", "target 'query.', column 6: '.' cannot stand here in a module name"),
        ("query}", "target 'query}', column 6: '}' cannot stand here in a module name"),
        ("re:", "target 're:', column 4: nothing follows 're:'"),
        (
            "query,rol:ffn.up",
            "target 'query,rol:ffn.up', column 7: unknown prefix 'rol:' (did you mean 'role'?);"
            " use role:, name:, glob: or re:",
        ),
        (
            "role:ffn.dwn",
            "target 'role:ffn.dwn', column 6: unknown role 'ffn.dwn' (did you mean 'ffn.down'?);"
            f" the roles are {', '.join(ROLES)}",
        ),
        (
            "query,.*key",
            "target 'query,.*key', column 7: a regular expression cannot share a string with other items; give a list",
        ),
        ("*.{a", "target '*.{a', column 3: '{' is never closed"),
        ("*.{}", "target '*.{}', column 4: '}' without alternatives before it"),
        ("*.a}", "target '*.a}', column 4: '}' without alternatives before it"),
        (
            "*.{a..c}",
            "target '*.{a..c}', column 5: '..' must stand between whole numbers, as in {0..5} or {0..10..2}",
        ),
        (
            "query, *.{0..}",
            "target 'query, *.{0..}', column 12: '..' must stand between whole numbers, as in {0..5} or {0..10..2}",
        ),
        ("*.{0..5..0}", "target '*.{0..5..0}', column 4: '0..5..0' has step 0 or more than 10000 numbers"),
        ("*.{0..99999}", "target '*.{0..99999}', column 4: '0..99999' has step 0 or more than 10000 numbers"),
        (
            ".*(query|value",
            "target '.*(query|value', column 3: not a regular expression: missing ), unterminated subpattern",
        ),
        (
            "re:a{9999999999}",
            "target 're:a{9999999999}', column 4: not a regular expression: the repetition number is too large",
        ),
        ("re:a**", "target 're:a**', column 6: not a regular expression: multiple repeat"),
    ],
)
def test_errors_name_the_piece_and_the_column(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Target.parse(spec)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


# --- the strings mean what they mean in PEFT ---

COMPONENT = st.sampled_from(["a", "ab", "b", "layer", "q_proj", "dense", "0", "1", "x-y", "query"])
PATH = st.lists(COMPONENT, min_size=1, max_size=5).map(".".join)
REGEX = st.lists(
    st.sampled_from(["a", "b", r"\.", ".", ".*", "(a|b)", "[ab]", "layer", r"\d+", "(?:q_proj|dense)", "b?"]),
    min_size=1,
    max_size=6,
).map("".join)


def peft_takes(target_modules: str | list[str], path: str) -> bool:
    return bool(check_target_module_exists(LoraConfig(target_modules=target_modules), path))


@given(st.lists(PATH, min_size=1, max_size=4), PATH)
def test_a_list_of_names_means_what_peft_means(names: list[str], path: str) -> None:
    assert (Target.parse(names).match(Use(path)) is not None) == peft_takes(names, path)


@given(REGEX, PATH)
def test_a_regular_expression_means_what_peft_means(regex: str, path: str) -> None:
    expected = peft_takes(regex, path)
    assert (Target.parse("re:" + regex).match(Use(path)) is not None) == expected
    if regex.startswith(".*") or set(regex) & set(r"\()|[]^$+"):
        assert (Target.parse(regex).match(Use(path)) is not None) == expected


@given(PATH, st.lists(PATH, min_size=1, max_size=3))
def test_exclude_means_what_peft_means(path: str, names: list[str]) -> None:
    for exclude, spec in ((names, names), (".*" + re.escape(names[0]), [".*" + re.escape(names[0])])):
        peft = check_target_module_exists(LoraConfig(target_modules=".*", exclude_modules=exclude), path)
        selector = Selector(Target.parse(".*"), Target.parse(spec))
        # PEFT marks an excluded module by an object that is false.
        assert (selector.decide(Use(path), 0) is None) == bool(peft)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 4))
def test_blocks_mean_what_layers_to_transform_means(layers: list[int], block: int) -> None:
    path = f"model.layers.{block}.q_proj"
    peft = check_target_module_exists(LoraConfig(target_modules=["q_proj"], layers_to_transform=layers), path)
    selector = Selector(Target.parse("q_proj"), None, Blocks.parse(layers))
    assert (selector.decide(use(path), 4) is None) == bool(peft)


# --- laws of parsing ---

ITEM = st.one_of(
    PATH,
    st.just("all-linear"),
    st.sampled_from(ROLES).map("role:{}".format),
    PATH.map("*.{}".format),
    PATH.map("glob:{{a,b}}.{}".format),
    PATH.map("name:{}".format),
)


@given(st.lists(st.one_of(ITEM, REGEX.map("re:{}".format)), min_size=1, max_size=5))
def test_a_target_is_parsed_back_from_its_spec(spec: list[str]) -> None:
    target = Target.parse(spec)
    assert Target.parse(target.spec) == target
    assert hash(Target.parse(target.spec)) == hash(target)


@given(st.lists(ITEM, min_size=1, max_size=5))
def test_a_string_with_commas_is_the_list_of_its_items(spec: list[str]) -> None:
    target = Target.parse(spec)
    assert Target.parse(", ".join(spec)) == target
    assert Target.parse(str(target)) == target


# Python warns that "[[" may one day mean a nested set; the user may see that.
@pytest.mark.filterwarnings("ignore:Possible (nested set|set):FutureWarning")
@given(st.one_of(st.text(), st.text("ab.*?{},0123:-[]()|\\+$^ ", max_size=30)))
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    try:
        target = Target.parse(text)
    except UsageError:
        return
    assert Target.parse(target.spec) == target
    for item, count in target.hits(BERT[:5]).items():
        assert count or isinstance(nearest(item, BERT[:5]), str)


NUMBER = st.integers(0, 12)


@st.composite
def brace_range(draw: st.DrawFn) -> tuple[str, set[str]]:
    first, last, step = draw(NUMBER), draw(NUMBER), draw(st.integers(1, 4))
    sign = 1 if first <= last else -1
    numbers = {first + sign * offset for offset in range(0, abs(last - first) + 1, step)}
    return f"{first}..{last}" + (f"..{step}" if step > 1 else ""), {str(number) for number in numbers}


WORD = st.sampled_from(["a", "b", "layer", "7", "q_proj", ""]).map(lambda word: (word, {word}))
PLAIN = st.sampled_from(["a", ".", "x.", "12"]).map(lambda text: (text, {text}))


def braces(
    alternative: st.SearchStrategy[tuple[str, set[str]]],
) -> st.SearchStrategy[tuple[str, set[str]]]:
    return (
        st.lists(alternative, min_size=1, max_size=3)
        .map(lambda parts: ("{" + ",".join(p[0] for p in parts) + "}", set().union(*(p[1] for p in parts))))
        .filter(lambda pair: pair[0] != "{}")
    )


GROUP = braces(st.one_of(brace_range(), WORD, braces(st.one_of(brace_range(), WORD))))


@given(
    st.lists(st.one_of(PLAIN, GROUP), min_size=1, max_size=4),
    st.lists(st.sampled_from("ab.x127"), max_size=4),
)
def test_braces_match_exactly_what_they_enumerate(parts: list[tuple[str, set[str]]], other: list[str]) -> None:
    glob = "".join(text for text, _ in parts)
    enumerated = {"".join(choice) for choice in itertools.product(*(sorted(words) for _, words in parts))}
    target = Target.parse("glob:" + glob)
    assert all(target.match(Use(path)) for path in enumerated)
    path = "".join(other)
    assert (target.match(Use(path)) is not None) == (path in enumerated)


# --- selectors ---


@pytest.mark.parametrize(
    ("targets", "exclude", "blocks", "candidate", "reason"),
    [
        ("query", None, None, use("a.query"), None),
        ("query", None, None, use("a.key"), "not named by targets"),
        ("dense", "pooler.dense", None, use("bert.pooler.dense"), "excluded by 'pooler.dense'"),
        ("dense", ["query", "*.pooler.*"], None, use("bert.pooler.dense"), "excluded by '*.pooler.*'"),
        ("query", None, "0..5", use("bert.layer.7.query"), "block 7 is outside 0..5"),
        ("query", None, "0..5,8", use("bert.layer.7.query"), "block 7 is outside 0..5,8"),
        (
            "dense",
            None,
            "0..5",
            use("bert.pooler.dense"),
            "not in a numbered block, and only blocks 0..5 are wanted",
        ),
        ("all-linear", None, None, use("classifier"), "'all-linear' leaves out the output layer"),
        ("all-linear", None, None, use("wte", "embedding"), "embedding is not a linear layer"),
        ("all-linear,classifier", None, None, use("classifier"), None),
        ("all-linear", None, None, use("transformer.h.0.attn.c_attn", "addmm"), None),
    ],
)
def test_decide_gives_the_reason(
    targets: str, exclude: str | list[str] | None, blocks: str | None, candidate: Use, reason: str | None
) -> None:
    selector = Selector(
        Target.parse(targets),
        Target.parse(exclude) if exclude else None,
        Blocks.parse(blocks) if blocks else None,
    )
    assert selector.decide(candidate, 11) == reason


@pytest.mark.parametrize(
    ("spec", "inside", "text"),
    [
        ("0..5", {0, 1, 2, 3, 4, 5}, "0..5"),
        ("0..2, 8", {0, 1, 2, 8}, "0..2,8"),
        (3, {3}, "3"),
        ([1, 4], {1, 4}, "1,4"),
        ((0, "-2..-1"), {0, 10, 11}, "0,-2..-1"),
        ("-1", {11}, "-1"),
        (-12, {0}, "-12"),
        ("9..-1", {9, 10, 11}, "9..-1"),
        ("12..20", set(), "12..20"),
        ("-40", set(), "-40"),
    ],
)
def test_blocks(spec: str | int | list[int], inside: set[int], text: str) -> None:
    blocks = Blocks.parse(spec)
    assert {block for block in range(12) if blocks.contains(block, last_block=11)} == inside
    assert str(blocks) == text
    assert Blocks.parse(text) == blocks


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0-5", "blocks '0-5': '0-5' is neither an index nor a range such as '0..5'"),
        ("0..5,", "blocks '0..5,': '' is neither an index nor a range such as '0..5'"),
        ("5..0", "blocks '5..0': '5..0' ends before it starts; write '0..5'"),
        ("-1..-2", "blocks '-1..-2': '-1..-2' ends before it starts; write '-2..-1'"),
        ([], "blocks []: give an index, a range such as '0..5', or a list of them"),
        (1.5, "blocks 1.5: give an index, a range such as '0..5', or a list of them"),
        ([1.5], "blocks [1.5]: '1.5' is neither an index nor a range such as '0..5'"),
        (True, "blocks True: 'True' is neither an index nor a range such as '0..5'"),
    ],
)
def test_blocks_errors(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Blocks.parse(spec)


def test_names_are_looked_up_and_count_as_if_they_were_gone_through() -> None:
    paths = [f"layers.{n}.{m}" for n in range(12) for m in ("attn.query", "attn.key", "ffn.query")]
    uses = [Use(path) for path in paths]
    spec = [*paths[:20], "query", "name:query", "ffn.query", "*.attn.*", "re:.*key", "role:ffn.*", "y", "layers.1"]
    target = Target.parse(spec)
    assert target.hits(uses) == {item.text: sum(map(item.matches, uses)) for item in target.items}
    for use in uses:
        assert target.match(use) == next((item for item in target.items if item.matches(use)), None)
    asked: list[str] = []

    class Counted(Item):
        def matches(self, candidate: Candidate) -> bool:
            asked.append(self.text)
            return super().matches(candidate)

    counted = Target(tuple(Counted(item.text, item.kind, item.body, item.pattern) for item in target.items))
    assert counted.hits(uses) == target.hits(uses)
    assert {*asked} == {"*.attn.*", "re:.*key", "role:ffn.*"}, "of names none is asked"


def test_hits_count_every_item_before_exclude_and_blocks() -> None:
    selector = Selector(Target.parse(["query", "valeu", "role:ffn.*"]), Target.parse("query"), Blocks.parse("0"))
    assert selector.hits(BERT) == {"query": 12, "valeu": 0, "role:ffn.*": 24}


@pytest.mark.parametrize(
    ("item", "hint"),
    [
        ("valeu", " (did you mean 'value'?)"),
        ("Query", " (did you mean 'query'?)"),
        ("all_linear", " (did you mean 'all-linear'?)"),
        ("attention.self.quer", " (did you mean 'attention.self.query'?)"),
        ("attention", " (did you mean '*.attention.*'?)"),
        ("bert.encoder", " (did you mean 'bert.encoder.*'?)"),
        ("encoder.layer.{0..5}.*.query", " (did you mean '*.encoder.layer.{0..5}.*.query'?)"),
        ("*.layer.*.atention.*", " (did you mean 'attention'?)"),
        (
            r"encoder\.layer\.\d+\.output\.dense",
            " (it must match the whole path: begin and end it with '.*')",
        ),
        (r".*\.(querry|vvv)", " (did you mean 'query'?)"),
        (
            "role:router",
            " (roles here: attn.key, attn.out, attn.query, attn.value, embedding, ffn.down, ffn.up,",
        ),
        ("zzz", " (names here: word_embeddings, query, key, value, dense, classifier)"),
    ],
)
def test_nearest_says_what_may_have_been_meant(item: str, hint: str) -> None:
    assert Selector(Target.parse(item)).hits(BERT) == {item: 0}
    assert nearest(item, BERT).startswith(hint)


def test_nearest_has_nothing_to_say_without_candidates() -> None:
    assert nearest("query", []) == ""
    assert nearest("all-linear", [use("wte", "embedding")]) == ""


# --- roles ---


@pytest.mark.parametrize(
    ("path", "role"),
    [
        *((c.module, c.role) for c in BERT[:1]),
        ("bert.encoder.layer.0.attention.self.query", "attn.query"),
        ("bert.encoder.layer.0.attention.self.key", "attn.key"),
        ("bert.encoder.layer.0.attention.self.value", "attn.value"),
        ("bert.encoder.layer.0.attention.output.dense", "attn.out"),
        ("bert.encoder.layer.0.intermediate.dense", "ffn.up"),
        ("bert.encoder.layer.0.output.dense", "ffn.down"),
        ("bert.pooler.dense", "other"),
        ("cls.predictions.transform.dense", "other"),
        ("cls.predictions.decoder", "head"),
        ("cls.seq_relationship", "head"),
        ("qa_outputs", "head"),
        ("classifier", "head"),
        ("classifier.dense", "head"),
        ("classifier.out_proj", "head"),
        ("lm_head.decoder", "head"),
        ("lm_head.dense", "other"),
        ("distilbert.transformer.layer.0.attention.q_lin", "attn.query"),
        ("distilbert.transformer.layer.0.attention.k_lin", "attn.key"),
        ("distilbert.transformer.layer.0.attention.v_lin", "attn.value"),
        ("distilbert.transformer.layer.0.attention.out_lin", "attn.out"),
        ("distilbert.transformer.layer.0.ffn.lin1", "ffn.up"),
        ("distilbert.transformer.layer.0.ffn.lin2", "ffn.down"),
        ("pre_classifier", "other"),
        ("vocab_projector", "head"),
        ("deberta.encoder.layer.0.attention.self.query_proj", "attn.query"),
        ("deberta.encoder.layer.0.attention.self.pos_key_proj", "attn.key"),
        ("deberta.encoder.layer.0.attention.self.value_proj", "attn.value"),
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense", "attn.out"),
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn", "ffn.up"),
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output", "ffn.down"),
        ("transformer.h.0.attn.c_attn", "attn.qkv"),
        ("transformer.h.0.attn.c_proj", "attn.out"),
        ("transformer.h.0.mlp.c_fc", "ffn.up"),
        ("transformer.h.0.mlp.c_proj", "ffn.down"),
        ("score", "head"),
        ("model.layers.0.self_attn.q_proj", "attn.query"),
        ("model.layers.0.self_attn.k_proj", "attn.key"),
        ("model.layers.0.self_attn.v_proj", "attn.value"),
        ("model.layers.0.self_attn.o_proj", "attn.out"),
        ("model.layers.0.mlp.gate_proj", "ffn.gate"),
        ("model.layers.0.mlp.up_proj", "ffn.up"),
        ("model.layers.0.mlp.down_proj", "ffn.down"),
        ("lm_head", "head"),
        ("model.layers.0.self_attn.qkv_proj", "attn.qkv"),
        ("model.layers.0.mlp.gate_up_proj", "ffn.gate_up"),
        ("model.layers.0.attn.Wqkv", "attn.qkv"),
        ("model.layers.0.attn.Wo", "attn.out"),
        ("model.layers.0.mlp.Wi", "ffn.gate_up"),
        ("model.layers.0.mlp.Wo", "ffn.down"),
        ("head.dense", "other"),
        ("decoder", "head"),
        ("encoder.block.0.layer.0.SelfAttention.q", "attn.query"),
        ("decoder.block.0.layer.1.EncDecAttention.o", "attn.out"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "ffn.up"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0", "ffn.gate"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_1", "ffn.up"),
        ("encoder.block.0.layer.1.DenseReluDense.wo", "ffn.down"),
        ("vit.layers.0.attention.o_proj", "attn.out"),
        ("vit.layers.0.mlp.fc1", "ffn.up"),
        ("vit.embeddings.patch_embeddings.projection", "embedding"),
        ("vision_model.encoder.layers.0.self_attn.out_proj", "attn.out"),
        ("vision_model.encoder.layers.0.mlp.fc2", "ffn.down"),
        ("model.decoder.layers.0.encoder_attn.out_proj", "attn.out"),
        ("model.decoder.layers.0.fc2", "ffn.down"),
        ("proj_out", "head"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.block_sparse_moe.gate", "router"),
        ("gpt_neox.layers.0.attention.query_key_value", "attn.qkv"),
        ("gpt_neox.layers.0.attention.dense", "attn.out"),
        ("backbone.layers.0.mixer.out_proj", "other"),
        ("", "other"),
    ],
)
def test_role_of(path: str, role: str) -> None:
    assert role_of(path, "embedding" if role == "embedding" else "linear") == role


def test_a_look_up_is_an_embedding_whatever_its_name() -> None:
    assert role_of("mpnet.encoder.relative_attention_bias", "embedding") == "embedding"
    assert role_of("lm_head", "embedding") == "embedding"


def tiny(family: str) -> nn.Module:
    if family == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, bos_token_id=0, eos_token_id=0)
        return GPT2ForSequenceClassification(config)
    return RobertaForSequenceClassification(
        RobertaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )


# PEFT calls a method that transformers has renamed; that is theirs to settle.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_all_linear_takes_what_peft_takes(family: str) -> None:
    """PEFT must be told that the model is a classifier, or it adapts the head, too."""
    model = tiny(family)
    kinds = {nn.Linear: "linear", Conv1D: "addmm", nn.Embedding: "embedding"}
    uses = [use(name, kinds[type(m)]) for name, m in model.named_modules() if type(m) in kinds]
    config = LoraConfig(target_modules="all-linear", task_type=TaskType.SEQ_CLS, fan_in_fan_out=family == "gpt2")
    adapted = get_peft_model(model, config).named_modules()  # pyright: ignore[reportArgumentType]
    prefix = "base_model.model."
    expected = {name.removeprefix(prefix) for name, module in adapted if isinstance(module, LoraLayer)}
    assert set(taken("all-linear", uses)) == expected


def test_targets_need_no_torch() -> None:
    code = "import sys, lorafx.graph.target; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
