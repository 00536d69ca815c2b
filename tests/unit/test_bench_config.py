"""The benchmark's own daemon has the device's settings, wherever they affect the result."""

from __future__ import annotations

from pathlib import Path

from edge_agent import settings
from edge_agent.bench.sides import Subject, _config
from edge_agent.cache.store import Store
from tests.support import committed


def test_models_have_the_same_rights_in_a_benchmark(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        f'state_dir = "{tmp_path}/state"\n[models.assistant]\nuri = "models:/phi@prod"\ncontext_tokens = 512\n'
        '[models.assistant.sandbox]\nnetwork = true\nread = ["/srv/table"]\n'
        "[trust]\nallow_unsigned_code = true\nunconfined_code = true\n"
    )
    given = settings.load(config)
    store = Store(given.state_dir)
    store.create()
    subject = Subject(
        settings=given,
        store=store,
        record=committed.commit(store, 1),
        folder=tmp_path,
        onnx=tmp_path,
        threads=2,
    )
    made = tmp_path / "bench.toml"
    made.write_text(_config(subject, tmp_path, tmp_path / "bench", 1883))
    found = settings.load(made)
    assert found.models["assistant"] == given.models["assistant"]
    assert found.trust == given.trust
