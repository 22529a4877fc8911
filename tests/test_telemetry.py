import subprocess
import sys


def test_onnxruntime_does_not_report(bundle_folder, tmp_path):
    """Its telemetry keeps a file `.ses` in the temporary folder, and none is there."""
    code = (
        "import pathlib; from crosstill.bundle import Bundle; "
        "from crosstill.bundle import Encoder; "
        f"Encoder(Bundle.open(pathlib.Path({str(bundle_folder)!r}))).warm()"
    )
    plain = {"PATH": "/usr/bin", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=plain)
    assert list(tmp_path.iterdir()) == []
