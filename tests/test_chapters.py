"""The chapters as a reader runs them. All of them together take minutes, and are `heavy`. Chapters 00 to 15."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minprfaas.cluster.topology import Topology
from minprfaas.commands import cluster
from minprfaas.commands.live_options import checked
from minprfaas.config import LinkConfig

TUTORIALS = Path(__file__).resolve().parent.parent / "tutorials"
CHAPTERS = sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))
WITH_HELPER = [path for path in CHAPTERS if "import helper" in path.read_text()]
DEADLINE_S = 900  # a busy machine may give a chapter a twentieth of its time


def start(chapter, *options):
    return subprocess.Popen([sys.executable, str(chapter), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("chapter", WITH_HELPER, ids=lambda path: path.stem)
def test_a_chapter_says_what_it_is_before_it_loads_anything(chapter):
    running = start(chapter, "--help")
    said, errors = running.communicate(timeout=60)
    assert running.returncode == 0 and errors == ""
    assert f"Chapter {chapter.name[:2]}" in said and f"python tutorials/{chapter.name}" in said


@pytest.mark.heavy
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_runs_alone_and_keeps_what_it_promises(chapter):
    running = start(chapter)
    said, errors = running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 0, errors
    assert "Traceback" not in errors and not re.search(r"\b(?:FALSE|DIFFERENT|BROKEN|NOT|DAMAGED)\b", said)


@pytest.mark.heavy
@pytest.mark.parametrize("chapter", WITH_HELPER, ids=lambda path: path.stem)
def test_ctrl_c_ends_a_chapter_with_one_line_and_a_reader_who_leaves_with_none(chapter):
    running = start(chapter)
    while running.stdout.readline().strip() == "":
        assert running.poll() is None, running.stderr.read()
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=DEADLINE_S)
    assert (running.returncode, errors) == (130, "interrupted\n")

    running = start(chapter)
    running.stdout.readline()
    running.stdout.close()
    assert running.wait(DEADLINE_S) == 1 and running.stderr.read() == ""


def test_the_front_end_of_a_chapter_and_the_nodes_that_it_starts_mean_the_same_links(monkeypatch):
    """Each end makes its own; where they disagree the link is refused, and chapters 13 and 14 end in an error."""
    monkeypatch.syspath_prepend(str(TUTORIALS))
    from nodes import LiveCluster, link_config

    topology = Topology(prfaas=1, pd=2, split=1)
    front, *nodes = topology.places()
    options = ["--topology", "prfaas=1,pd=2", "--split", "1", "--link-timeout-s", "2", *LiveCluster.OPTIONS]
    run = checked(cluster.parser().parse_args(options), topology)
    for node in nodes:
        assert link_config(run.link, node, front) == link_config(LinkConfig(timeout_s=2.0), front, node)


def test_a_ctrl_c_while_a_process_is_started_ends_the_chapter_and_never_reaches_the_process():
    """The process says which signals it does not hear; the one that came meanwhile is taken afterwards."""
    chapter = ("import os, signal, subprocess, sys, helper\n"
               "helper.begin('Chapter 99')\n"
               "with helper.out_of_reach_of_the_keyboard():\n"
               "    child = 'import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))'\n"
               "    subprocess.run([sys.executable, '-c', child])\n"
               "    os.kill(os.getpid(), signal.SIGINT)\n"
               "print('not reached')\n")
    done = subprocess.run([sys.executable, "-c", chapter], capture_output=True, text=True, timeout=DEADLINE_S,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TUTORIALS.parent), str(TUTORIALS)])})
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert "SIGINT" in done.stdout and "not reached" not in done.stdout
