"""Settings from flags, the environment and a file: which comes first, what is wrong with one."""

from __future__ import annotations

from dataclasses import MISSING
from pathlib import Path

import pytest
import yaml

from headstart.engine.config import EngineConfig
from headstart.engine.errors import ConfigError
from headstart.server.cli import main as cli
from headstart.server.cli.commands import Serve
from headstart.server.cli.flags import SECRETS, variable
from headstart.server.http.keys import Keys
from headstart.server.settings import settings_of

SETTINGS = {variable(field, setting): (field, setting) for field, setting in settings_of(Serve)}


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch):
    for name in (*SETTINGS, "HEADSTART_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path):
    """Writes a file, and gives the flag that names it."""

    def write(text: str) -> list[str]:
        (tmp_path / "settings.yaml").write_text(text)
        return ["--config", str(tmp_path / "settings.yaml")]

    return write


def test_a_flag_before_a_variable_before_the_file_before_the_default(config, monkeypatch):
    flags = config("max-n: 2\nmax-stop: 2\nmax_tools: 2\n")
    monkeypatch.setenv("HEADSTART_MAX_N", "3")
    monkeypatch.setenv("HEADSTART_MAX_STOP", "3")
    options = cli.parse("serve", "m", *flags, "--max-n", "4")
    found = (options.max_n, options.max_stop, options.max_tools, options.max_prompts)
    assert found == (4, 3, 2, Serve(model="m").max_prompts)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in SECRETS])
def test_every_setting_by_every_way(name, config, monkeypatch, tmp_path):
    """A value that is not the default, the same by flag, variable and file."""
    field, setting = SETTINGS[name]
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    texts = [*setting.choices, "7", "folder", "a=folder", "a:1", "https://a.b", "env"]
    for text in texts:
        try:
            value = setting.parse(text)
        except Exception:
            continue
        if value != field.default:
            break
    flag = setting.flag_of(field.name)
    if setting.switch is not None:
        given, text = [flag], "true"
    elif setting.positional:
        given = [text]
    else:
        given = [flag, text]
    model = [] if setting.positional else ["m"]
    by_flag = cli.parse("serve", *model, *given)
    assert getattr(by_flag, field.name) not in (field.default, MISSING)
    by_file = cli.parse("serve", *model, *config(yaml.safe_dump({flag.strip("-"): text})))
    monkeypatch.setenv(name, text)
    by_variable = cli.parse("serve", *model)
    assert by_flag == by_file == by_variable


def test_lists(config, monkeypatch):
    assert cli.parse("serve", "m", *config("allowed-hosts: [a, b]")).allowed_hosts == ("a", "b")
    assert cli.parse("serve", "m", *config("allowed-hosts: a")).allowed_hosts == ("a",)
    monkeypatch.setenv("HEADSTART_ALLOWED_HOSTS", "c, d")
    assert cli.parse("serve", "m").allowed_hosts == ("c", "d")
    # One source gives all of them: a flag does not add to a variable.
    assert cli.parse("serve", "m", "--allowed-hosts", "e").allowed_hosts == ("e",)


def test_words_that_yaml_takes_for_others(config):
    assert cli.parse("serve", "m", *config("relay: on")).relay == "on"
    assert cli.parse("serve", "m", *config("relay: off")).relay == "off"
    assert cli.parse("serve", "m", *config("shared-cache: yes")).shared_cache is True
    assert cli.parse("serve", "m", *config("no-prefix-caching: true")).prefix_caching is False
    assert cli.parse("serve", "m", *config("no-prefix-caching: false")).prefix_caching is True
    assert cli.parse("serve", "m", *config("max-n:\nmax-stop: 3")).max_stop == 3
    assert cli.parse("serve", "m", *config("# nothing")) == Serve(model="m")


def test_the_model_may_be_in_either(config, monkeypatch):
    assert cli.parse("serve", *config("model: one")).model == "one"
    monkeypatch.setenv("HEADSTART_MODEL", "two")
    assert cli.parse("serve").model == "two"
    assert cli.parse("serve", "three").model == "three"


def test_a_file_by_a_variable_and_for_several_commands(config, monkeypatch):
    _, path = config("port: 9\nmax-running: 3\nprefix: 64\n")
    monkeypatch.setenv("HEADSTART_CONFIG", path)
    assert (cli.parse("serve", "m").port, cli.parse("serve", "m").max_running) == (9, 3)
    assert (cli.parse("plan").prefix, cli.parse("plan").max_running) == (64, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-n: no", "max-n: 'false' is not a whole number above 0"),
        ("max-n: [1, 2]", "max-n: one value is wanted, not 2"),
        ("max-n: {a: 1}", "max-n is neither a value nor a list of values"),
        ("allowed-hosts: []", "allowed-hosts is neither a value nor a list of values"),
        ("relay: sometimes", "relay: 'sometimes' is none of auto, on, off"),
        ("shared-cache: perhaps", "shared-cache: 'perhaps' is neither true nor false"),
        ("max-m: 1", "there is no setting 'max-m'; do you mean max-n?"),
        ("1: 1", "there is no setting '1'"),
        ("max-n 1", "is no mapping of settings to values, such as max-n: 4"),
        ("- max-n", "is no mapping of settings to values, such as max-n: 4"),
        ("max-n: [1", "is no YAML"),
        ("max-n: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(text, message, config, capsys):
    assert cli.main(["serve", "m", *config(text)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("headstart: error: --config ")
    assert message in error
    assert error.count("\n") == 1


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        cli.parse("serve", "m", "--config", str(tmp_path / "missing"))
    (tmp_path / "odd").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="odd"):
        cli.parse("serve", "m", "--config", str(tmp_path / "odd"))


def test_byte_order_marks_are_of_no_file(tmp_path, model_folder):
    file = tmp_path / "file"
    file.write_bytes(b"\xef\xbb\xbfmax-n: 3\n")
    assert cli.parse("serve", "m", "--config", str(file)).max_n == 3
    file.write_bytes(b"\xef\xbb\xbfa-key-of-16-chars\n")
    options = cli.parse("serve", "m", "--api-key-file", str(file))
    assert cli.server_settings(options).keys == Keys.of(api=["a-key-of-16-chars"])
    file.write_bytes(b"\xef\xbb\xbf{{ messages }}")
    options = cli.parse("serve", "m", "--chat-template", str(file))
    assert cli.tokenizer_of(options, model_folder).chat_template == "{{ messages }}"


def test_what_is_wrong_with_a_variable_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("HEADSTART_KV_MEMORY", "much")
    assert cli.main(["serve", "m"]) == 1
    error = capsys.readouterr().err
    assert error == (
        "headstart: error: HEADSTART_KV_MEMORY: 'much' is not a size such as 2GiB or 500MB\n"
    )


def test_variables_that_are_no_settings(monkeypatch):
    """A service that Kubernetes calls headstart leaves its addresses; others are set to nothing."""
    monkeypatch.setenv("HEADSTART_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("HEADSTART_MAX_N", "")
    assert cli.parse("serve", "m") == Serve(model="m")


def test_keys_of_the_environment_are_read_once(monkeypatch):
    monkeypatch.setenv("HEADSTART_API_KEY", "a-key-of-16-chars, b-key-of-16-chars")
    options = cli.parse("serve", "m")
    assert options.api_key == ()
    assert len(cli.server_settings(options).keys.api) == 2


def test_what_is_missing_is_wrong_usage(capsys):
    for argv in (["serve"], ["pull"], ["run-batch", "in"], ["runahead-rank", "m"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
        assert "the following arguments are required: " in capsys.readouterr().err


def test_the_engines_settings_are_those_of_its_config():
    """Each has a flag, or is made of some."""
    made = {"model_path", "adapters", "runahead_secret"}
    assert set(EngineConfig.__struct_fields__) - made <= {
        field.name for field, _ in settings_of(Serve)
    }


def test_names_are_told_apart():
    assert len(SETTINGS) == len(list(settings_of(Serve)))
    assert isinstance(Serve(model="m").cache_dir, Path)
