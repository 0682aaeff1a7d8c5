"""kubectl itself against an API server that validates what it is sent."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.kubernetes.api_server import Cluster, cluster
from tests.launch.kubernetes.conftest import Launch

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that kubectl is configured to reach."""
    with cluster() as found:
        monkeypatch.setenv("HOME", str(tmp_path))  # kubectl keeps what it discovers there
        monkeypatch.setenv("KUBECONFIG", found.kubeconfig(tmp_path / "kubeconfig", "ml"))
        yield found


def test_the_cluster_takes_it_with_every_field_checked(launch: Launch, folder: Path, there: Cluster) -> None:
    # More than kubectl can note in an annotation, as it does where the client applies.
    (folder / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b" * 400_000}) + "\n")
    status, _, err = launch("--nodes", "2", "--gpus", "3")
    assert status == 0, err
    assert set(there.objects) == {
        "ml/persistentvolumeclaims/first", "ml/configmaps/first-files", "ml/configmaps/first-settings",
        "ml/services/first", "ml/jobs/first",
    }  # fmt: skip
    assert all("fieldManager=luthier" in query and "fieldValidation=Strict" in query for query in there.queries)
    assert "job.batch/first serverside-applied" in err
    status, _, err = launch("--nodes", "2", "--gpus", "3")
    assert status == 2 and "a job first is there already" in err


def test_a_cluster_refuses_what_it_does_not_know(folder: Path, there: Cluster, launch: Launch) -> None:
    """That the stand-in checks: the same manifests with one letter changed."""
    assert launch("--dry-run", "--out", "there")[0] == 0
    path = folder / "there" / "job.yaml"
    path.write_text(path.read_text().replace("backoffLimit", "backofLimit"))
    command = ["kubectl", "apply", "--server-side", "-f", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "backofLimit" in done.stderr
