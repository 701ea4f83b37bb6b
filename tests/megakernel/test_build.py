import ctypes
import shutil

import pytest

from megakernel.build import BuildError, Compiler, build, find_compiler

SOURCE = 'extern "C" int answer() { return ANSWER; }\n'

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"none of no-such-c\+\+ is on the path.*apt-get install g\+\+"):
        find_compiler(["no-such-c++"])


@needs_compiler
def test_cxx_comes_first(monkeypatch):
    monkeypatch.setenv("CXX", "c++" if shutil.which("c++") else "g++")
    assert find_compiler(["no-such-c++"]).version


@needs_compiler
def test_a_library_is_built_once_and_again_for_other_flags(tmp_path):
    said = []
    first = build(SOURCE, folder=tmp_path, extra_flags=["-DANSWER=42"], progress=lambda *at: said.append(at))
    assert ctypes.CDLL(str(first)).answer() == 42
    assert said == [("compiling", 0.0), ("compiling", 1.0)]
    stamp = first.stat().st_mtime_ns
    assert build(SOURCE, folder=tmp_path, extra_flags=["-DANSWER=42"]) == first
    assert first.stat().st_mtime_ns == stamp
    other = build(SOURCE, folder=tmp_path, extra_flags=["-DANSWER=43"])
    assert other != first
    assert ctypes.CDLL(str(other)).answer() == 43
    assert sorted(tmp_path.iterdir()) == sorted([first, other])


@needs_compiler
def test_what_the_compiler_says_is_in_the_error_and_nothing_is_left(tmp_path):
    with pytest.raises(BuildError, match=r"(?s)failed with status \d+:.*error"):
        build("this is no C++", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_hangs_is_given_up(tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 5\n")
    slow.chmod(0o755)
    monkeypatch.setattr("megakernel.build.BUILD_LIMIT_S", 0.2)
    with pytest.raises(BuildError, match="took longer than"):
        build(SOURCE, folder=tmp_path / "cache", compiler=Compiler(str(slow), "1"))
