"""Profiles are read, and a failed one says why."""

import subprocess

import pytest
from support.bench import play_ncu

from bench import gpu, ncu


def test_profiles_are_read(tmp_path, monkeypatch):
    play_ncu(tmp_path, monkeypatch)
    made = ncu.command(ncu.path(), tmp_path / "ncu.csv", ["-c", "print('ran')"])
    assert made[1:3] == ["--clock-control", "none"]  # the clocks stay as they are
    assert subprocess.run(made, check=True, capture_output=True, text=True).stdout == "ran\n"
    (line,) = ncu.profiles(tmp_path / "ncu.csv")
    assert line.startswith("_topk_kernel: time 4.25 us, read 1,2 Mbyte, written 0")
    (tmp_path / "ncu.csv").write_text("==ERROR== no permission\n")
    with pytest.raises(ValueError, match=r"ncu.csv has no table of kernels: ==ERROR== no permission"):
        ncu.profiles(tmp_path / "ncu.csv")
    with pytest.raises(ValueError, match=r"ncu wrote no none.csv"):
        ncu.profiles(tmp_path / "none.csv")


def test_a_profile_that_failed_says_why(tmp_path, monkeypatch):
    play_ncu(tmp_path, monkeypatch)
    script = tmp_path / "bin/ncu"
    script.write_text(
        script.read_text().replace("sys.exit(status)", "open(out, 'w').write('==ERROR== no counters\\n'); sys.exit(9)")
    )
    assert gpu.run(tmp_path / "out", 2, ["ncu"], gpu.Mode(rehearse=True), lambda line: None) == 1
    assert "ncu: exit status 9: ==ERROR== no counters" in (tmp_path / "out/summary.txt").read_text()
