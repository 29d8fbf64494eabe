"""Keys: what names a piece of work on disk, what changes its name, and what does not."""

import json
from dataclasses import MISSING, fields, replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from igd_lib import evaluation
from igd_lib.baselines import minimax
from igd_lib.baselines.minimax import Minimax
from igd_lib.config import AUGMENTATION, STANDARD, Fidelity, Guidance
from igd_lib.distillation import Wanted
from igd_lib.evaluation import Cell, evaluate_all
from igd_lib.guides import Shortcuts
from igd_lib.pipeline import IGDPipeline
from igd_lib.protocols import IGD_HARD, Protocol
from igd_lib.sampling import Sampling, architecture
from igd_lib.surrogate import SurrogateTraining
from igd_lib.tools import keys

GUIDANCE = Guidance(5.0, 30.0, (1, 4))
SMALL = replace(IGD_HARD, image_size=16, epochs=1)


@pytest.fixture
def settings(tiny_pipe, toy, toy_data):
    """Factory: the settings of a piece of work, by the dataclass that says how it is made."""

    def of_set(pipe=tiny_pipe, **options):
        guided = dict(guidance=GUIDANCE, checkpoints=toy().checkpoints, num_steps=6)
        return Wanted(Sampling(pipe, **(guided | options)), toy_data, 3, 0, [0, 1, 2], [4, 0, 9]).settings

    def of_evaluation(protocol=SMALL, **options):
        cell = Cell(toy_data, toy_data, "convnet2", protocol, 0, None, "cpu", "float32")
        return replace(cell, **options).settings

    def make(value=None, **options):
        if isinstance(value, Protocol):
            return of_evaluation(value, **options)
        if isinstance(value, Minimax):
            return minimax.settings(tiny_pipe, toy_data, value, [0, 1, 2], [0, 1, 2])
        if isinstance(value, SurrogateTraining):
            return value.settings(toy().checkpoints.model, toy_data)
        name = {Guidance: "guidance", Fidelity: "fidelity", Shortcuts: "shortcuts"}.get(type(value))
        return of_set(**({name: value} if name else {}), **options)

    return make


# --- a key is made of what differs from the frozen defaults


def test_a_key_by_hand(monkeypatch):
    """Kind, schema and the settings that are not at their default, the nested ones too."""
    monkeypatch.setitem(keys.SCHEMA, "set", 1)
    monkeypatch.setitem(keys.FROZEN, "set", {"steps": 50, "fidelity": {"eps": "a", "clamp": False}})
    found = {"name": "x", "steps": 50, "fidelity": {"eps": "b", "clamp": False}}
    changed = {"name": "x", "fidelity": {"eps": "b"}}
    assert keys.key("set", found) == keys.settings_hash({"kind": "set", "schema": 1, "settings": changed})
    assert keys.key("set", {"name": "x"}) == keys.key("set", {"name": "x", "steps": 50, "fidelity": {}})
    assert keys.manifest("set", found) == {
        "kind": "set",
        "schema": 1,
        "key": keys.key("set", found),
        "settings": found,
    }


def test_a_key_has_twelve_digits_of_its_kind_and_names_the_folder(own_cache):
    assert len({keys.key(kind, {"seed": 7}) for kind in keys.SCHEMA}) == len(keys.SCHEMA)
    assert keys.SCHEMA.keys() == keys.FROZEN.keys()
    name = keys.key("rded", {"seed": 7})
    assert len(name) == 12 and keys.folder("rded", {"seed": 7}) == own_cache / "rded" / name
    with pytest.raises(KeyError, match="rdde"):
        keys.key("rdde", {})


@pytest.mark.parametrize("nested", [False, True])
def test_a_new_setting_at_its_frozen_default_keeps_the_key(settings, monkeypatch, nested):
    """So sets of before the setting are found, and are compared as if they named it."""

    def named(value):
        new = {"twist": value}
        return before | ({"fidelity": before["fidelity"] | new} if nested else new)

    before = settings()
    key, manifest = keys.key("set", before), keys.manifest("set", before)
    frozen = keys.FROZEN["set"]
    more = {"fidelity": frozen["fidelity"] | {"twist": 0.5}} if nested else {"twist": 0.5}
    monkeypatch.setitem(keys.FROZEN, "set", frozen | more)
    assert keys.key("set", before) == keys.key("set", named(0.5)) == key != keys.key("set", named(0.75))
    assert keys.difference("set", manifest, named(0.5)) is None
    assert keys.difference("set", keys.manifest("set", named(0.5)), before) is None
    where = "fidelity.twist" if nested else "twist"
    assert keys.difference("set", manifest, named(0.75)) == f"{where} = 0.5, wanted 0.75"


def test_a_new_setting_that_is_not_frozen_changes_the_key(settings):
    before = settings()
    assert keys.key("set", before) != keys.key("set", before | {"twist": 0.5})


# --- every field that changes the result

RESULTS = {  # the value that is changed field by field, and the kind of work that it is a setting of
    "Fidelity": (STANDARD, "set"),
    "Guidance": (GUIDANCE, "set"),
    "Shortcuts": (Shortcuts(), "set"),
    "Protocol": (SMALL, "evaluation"),
    "Minimax": (Minimax(), "minimax"),
    "SurrogateTraining": (SurrogateTraining(), "surrogate"),
}
CHANGED = {  # where a number, a string or a choice more will not do
    "guided_range": (1, 3),
    "filter_images": (40, 500),
    "augment": AUGMENTATION,
    "keep_epochs": (0.0, 1.0),
    "lr_by_network": (("convnet", 0.1),),
    "batch_by_ipc": ((10, 32),),
    "batch_doubled_for": (3,),
    "over_100_classes": (0.1, 1e-4, 128),
    "epochs_by_ipc": ((10, 100), (float("inf"), 50)),
}
WITHOUT_EFFECT = {("SurrogateTraining", "epochs")}  # a longer trajectory holds a shorter one


def another(value, name):
    """Another possible value of a field."""
    old, hint = getattr(value, name), get_type_hints(type(value))[name]
    if name in CHANGED:
        return CHANGED[name]
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != old)
    if isinstance(old, bool):
        return not old
    if isinstance(old, tuple):
        return tuple(number + 1 for number in old)
    return 3 if old is None else old + ("x" if isinstance(old, str) else 1)


@pytest.mark.parametrize("name", RESULTS)
def test_every_field_changes_the_key(settings, name):
    value, kind = RESULTS[name]
    found = {"as it is": keys.key(kind, settings(value))}
    for field in fields(value):
        changed = replace(value, **{field.name: another(value, field.name)})
        assert changed != value, field.name
        key = keys.key(kind, settings(changed))
        if (name, field.name) in WITHOUT_EFFECT:
            assert key == found["as it is"], field.name
        else:
            assert key not in found.values(), f"{name}.{field.name} does not change the key"
            found[field.name] = key


FROZEN_AT = {  # where the defaults of a dataclass are listed
    "Fidelity": (Fidelity, ("set", "fidelity")),
    "Guidance": (Guidance, ("set", "guidance")),
    "Shortcuts": (Shortcuts, ("set", "shortcuts")),
    "Protocol": (Protocol, ("evaluation", "protocol")),
    "Minimax": (Minimax, ("minimax", "recipe")),
    "SurrogateTraining": (SurrogateTraining, ("surrogate",)),
}


@pytest.mark.parametrize("name", FROZEN_AT)
def test_every_default_is_frozen(name):
    """Without its line in FROZEN a new field would give every piece of work on disk another key."""
    kind, path = FROZEN_AT[name]
    frozen = keys.FROZEN
    for part in path:
        frozen = frozen[part]
    assert isinstance(frozen, dict), f"FROZEN{list(path)} is {frozen}: it cannot name the fields of {name}"
    for field in fields(kind):
        made = field.default if field.default_factory is MISSING else field.default_factory()
        if made is MISSING or (name, field.name) in WITHOUT_EFFECT:
            continue
        where = f"{name}.{field.name} = {made!r}"
        assert field.name in frozen, f"{where}: add it to FROZEN{list(path)} (igd_lib/tools/keys.py)"
        expected, present = (json.loads(json.dumps(value)) for value in (made, frozen[field.name]))
        assert present == expected, (
            f"{where}, frozen as {present!r}: a changed default would find work of the old one. "
            "Leave FROZEN as it is and name the new value where the work is made, or raise its SCHEMA"
        )


def test_weights_and_numbers_change_a_set_s_key(settings, tiny, toy, tiny_pipe):
    """What no dataclass holds: weights of each model, the small decoder, steps, CFG."""
    moved, vae = toy().checkpoints, tiny(num_classes=10).vae
    moved.states[0] = {name: value + 0.01 for name, value in moved.states[0].items()}
    with torch.no_grad():
        next(vae.parameters()).add_(0.01)
    changes = (
        dict(checkpoints=moved),
        dict(checkpoints=toy().checkpoints.keep([0, 2])),
        dict(pipe=IGDPipeline(tiny_pipe.transformer, vae, tiny_pipe.scheduler)),
        dict(guidance_decoder=tiny_pipe.vae),
        dict(guidance_decoder=vae),
        dict(cfg_scale=1.5),
        dict(num_steps=7),
        dict(precision="tf32"),
        dict(precision="bfloat16"),
        dict(guidance=None),
        dict(),
    )
    assert len({keys.key("set", settings(**change)) for change in changes}) == len(changes)


def test_how_activations_are_kept_is_no_part_of_the_key(settings):
    """Nor is a set of before precisions were a setting another one than float32's."""
    plain = settings()
    assert settings(recompute=True) == plain
    before = {name: value for name, value in plain.items() if name != "precision"}
    assert keys.key("set", before) == keys.key("set", plain)


def test_checkpoints_are_no_part_of_the_key_where_they_do_not_guide(settings):
    """Deviation guidance alone uses none."""
    alone = replace(GUIDANCE, k=0.0)
    assert keys.key("set", settings(alone)) == keys.key("set", settings(alone, checkpoints=None))


# --- a schema


@pytest.mark.parametrize("kind", keys.SCHEMA)
def test_another_schema_gives_another_key_and_is_named(tmp_path, monkeypatch, kind):
    key, manifest = keys.key(kind, {"name": "x"}), keys.manifest(kind, {"name": "x"})
    keys.claim(tmp_path / "manifest.json", kind, {"name": "x"}, "work")
    schema = keys.SCHEMA[kind]
    monkeypatch.setitem(keys.SCHEMA, kind, schema + 1)
    assert keys.key(kind, {"name": "x"}) != key
    found = f"it was made under schema {schema} of '{kind}', results now are of schema {schema + 1}"
    assert keys.difference(kind, manifest, {"name": "x"}) == found
    with pytest.raises(ValueError, match=f"holds work of other settings: {found}; choose another folder"):
        keys.claim(tmp_path / "manifest.json", kind, {"name": "x"}, "work")
    assert "made under schema None" in keys.difference(kind, {"settings": {"name": "x"}}, {"name": "x"})


# --- what is noted on disk


def test_new_work_is_noted_and_compared(tmp_path):
    path = tmp_path / "work" / "settings.json"
    settings = {"name": "x", "classes": ("a", "b"), "images": None}
    keys.claim(path, "gradients", settings, "gradients")
    assert json.loads(path.read_text()) == keys.manifest("gradients", settings)
    before = path.stat().st_mtime_ns
    keys.claim(path, "gradients", settings, "gradients")
    assert path.stat().st_mtime_ns == before
    with pytest.raises(
        ValueError, match=r"work holds gradients of other settings: classes\[1\] = b, wanted c"
    ):
        keys.claim(path, "gradients", settings | {"classes": ("a", "c")}, "gradients")
    with pytest.raises(ValueError, match="images = None, wanted 200; choose another folder"):  # 200 is frozen
        keys.claim(path, "gradients", {"name": "x", "classes": ("a", "b")}, "gradients")


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"3",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b'{"schema": %d, "settings": [1]}' % keys.SCHEMA["surrogate"],
        b'{"schema": %d, "settings": 3}' % keys.SCHEMA["surrogate"],
    ],
)
def test_a_damaged_manifest_says_what_to_delete(tmp_path, damage):
    path = tmp_path / "settings.json"
    path.write_bytes(damage)
    with pytest.raises(
        ValueError, match=r"settings\.json is damaged \(.*\); delete its folder and run again"
    ):
        keys.claim(path, "surrogate", {"lr": 0.1}, "a trajectory")
    assert path.read_bytes() == damage


# --- the same model saved by another version of diffusers


@pytest.fixture
def saved(tmp_path, tiny):
    """Factory: the tiny transformer saved, its config.json changed, and loaded again."""

    def make(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        tiny(num_classes=10).transformer.save_pretrained(folder)
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in config.items() if value != "removed"}))
        return type(tiny(num_classes=10).transformer).from_pretrained(folder)

    return make


@pytest.fixture
def key_of(settings, tiny_pipe):
    """The key of the set that a transformer would make in the tiny pipeline."""
    return lambda model: keys.key(
        "set", settings(pipe=IGDPipeline(model, tiny_pipe.vae, tiny_pipe.scheduler))
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"_diffusers_version": "9.9.9"},
        {"_name_or_path": "somewhere/else"},
        {"invented": 1},
        {"norm_eps": "removed", "dropout": "removed"},
        {"norm_eps": 1e-5, "dropout": 0.0},
    ],
    ids=str,
)
def test_a_model_saved_by_another_diffusers_keeps_the_key(saved, key_of, tiny_pipe, changes):
    """Unknown entries, and known ones at their default that are there or not, say nothing of the model."""
    assert key_of(saved(**changes)) == key_of(tiny_pipe.transformer)


def test_an_unknown_entry_registered_in_memory_keeps_the_key(saved, key_of, tiny_pipe):
    model = saved()
    model.register_to_config(invented=1, _more="x")
    assert model.config["invented"] == 1 and key_of(model) == key_of(tiny_pipe.transformer)


def test_another_architecture_of_the_same_weights_has_another_key(saved, key_of, tiny_pipe):
    """Four attention heads of 4 instead of two of 8: every tensor is alike, the function is not."""
    own, other = saved(), saved(num_attention_heads=4, attention_head_dim=4)
    assert all(torch.equal(*pair) for pair in zip(own.parameters(), other.parameters(), strict=True))
    assert key_of(other) != key_of(own)
    assert architecture(own) == architecture(tiny_pipe.transformer)
    differ = {name for name, value in architecture(other).items() if architecture(own).get(name) != value}
    assert differ == {"num_attention_heads", "attention_head_dim"}


def test_other_timestep_frequencies_have_another_key(saved, key_of):
    """They are this project's own entry, and change every prediction."""
    model = saved()
    model.register_to_config(timestep_frequencies="original")
    assert key_of(model) != key_of(saved())


# --- one cache for machines with and without bfloat16


def test_evaluations_in_either_precision_share_a_folder(toy_data, tmp_path, monkeypatch):
    """Another precision is another evaluation: both are kept, and each is read by those of its own."""
    options = dict(networks=["convnet1"], seeds=[0], protocol=SMALL, device="cpu", folder=tmp_path)
    found = [evaluate_all(toy_data, toy_data, mixed_precision=mixed, **options)[0] for mixed in (False, True)]
    assert [score.precision for score in found] == ["float32", "bfloat16"]
    names = {
        keys.key("evaluation", Cell.of(toy_data, toy_data, "convnet1", SMALL, 0, None, "cpu", mixed).settings)
        for mixed in (False, True)
    }
    assert len(names) == 2 and {path.name for path in tmp_path.iterdir()} == names
    monkeypatch.setattr(evaluation, "train_network", lambda *_: pytest.fail("trained again"))
    again = [evaluate_all(toy_data, toy_data, mixed_precision=mixed, **options)[0] for mixed in (False, True)]
    assert again == found
