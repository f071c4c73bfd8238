"""How many threads the kernels ask the OpenMP runtime for while something else has the cores: the runtime is a stand-in
whose threads are late where a test says so."""

import subprocess

import pytest

from calidrop.ops.build import SOURCES, _compiler

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "threads.h"

unsigned asked, late_from;  // threads of the last region; how many of them it takes for one to be late
long late;

extern "C" void GOMP_parallel(void (*run)(void*), void* with, unsigned threads, unsigned) {
  asked = threads;
  run(with);
  if (threads < late_from) return;
  ++late;
  std::this_thread::sleep_for(std::chrono::milliseconds(3));
}

// threads, and pairs: so many regions in which threads are late from so many on -> for each pair, how often one was
// late, threads at the end, and whether every task was done once
int main(int n, char** args) {
  const int threads = std::atoi(args[1]);
  for (int i = 2; i + 1 < n; i += 2) {
    late = 0, late_from = std::atoi(args[i + 1]);
    bool once = true;
    for (int r = 0; r < std::atoi(args[i]); ++r) {
      std::vector<int> done(7, 0);
      asked = 1;
      each(7, threads, [] { return 0; }, [&](int64_t task, int) { ++done[task]; });
      for (int x : done) once = once && x == 1;
    }
    std::printf("%ld %u %d\\n", late, asked, once);
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    try:
        compiler = _compiler()
    except OSError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("threads")
    (folder / "main.cpp").write_text(PROGRAM)
    made = [*compiler, "-std=c++17", "-O2", "-pthread", "-I", str(SOURCES), str(folder / "main.cpp")]
    subprocess.run([*made, "-o", str(folder / "main")], check=True)

    def run(threads: int, *pairs: tuple[int, int]) -> list[tuple[int, int, int]]:
        given = [str(x) for pair in pairs for x in pair]
        out = subprocess.run([folder / "main", str(threads), *given], check=True, capture_output=True, text=True).stdout
        return [tuple(map(int, line.split())) for line in out.splitlines()]

    return run


NEVER = 1000


def test_all_threads_are_asked_where_none_is_late(program):
    assert program(2, (300, NEVER)) == [(0, 2, 1)]
    assert program(1, (20, 1)) == [(0, 1, 1)]  # the runtime is not asked


def test_late_threads_are_waited_for_ever_more_rarely(program):
    """Not in every region, which took 24 s here and 64 of a scheduler's."""
    (late, _, once), (again, threads, still) = program(2, (8000, 2), (4000, NEVER))
    assert 5 <= late <= 15 and once
    assert again == 0 and threads == 2 and still  # all of them are back


def test_as_many_as_come_in_time_are_asked(program):
    """Of 16 cores, 10 are free."""
    (late, threads, once), (_, back, _) = program(16, (8000, 11), (6000, NEVER))
    assert late <= 20 and 4 <= threads <= 10 and once
    assert back == 16
