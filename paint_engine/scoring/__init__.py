"""The teacher on a vLLM server: it scores the student's rollouts, and its replies are checked."""

from paint_engine.scoring.replies import Asked
from paint_engine.scoring.scorer import Scorer
from paint_engine.scoring.server import ServedModel, TeacherDied, TeacherServer, find_teacher

__all__ = ["Asked", "Scorer", "ServedModel", "TeacherDied", "TeacherServer", "find_teacher"]
