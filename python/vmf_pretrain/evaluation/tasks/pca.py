"""Patches coloured by their first three principal components."""

from vmf_pretrain.config.tasks.pca import PcaTask
from vmf_pretrain.data.images import Images
from vmf_pretrain.evaluation.components import coloured_patches
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.pictures import plot_pictures
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.shown import readable
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import CentreSquare


class Pca(Task[PcaTask]):
    """The components are those of all drawn images together: a colour means the same in each of them."""

    name = "pca"

    def images(self, given: Given, settings: PcaTask) -> dict[str, Images]:
        """All of them, of which a few are drawn."""
        return {"all": given.all}

    def run(self, subject: Subject, settings: PcaTask) -> Result:
        """The picture, and how much of the variance it shows."""
        evaluated = subject.evaluated
        view = CentreSquare(evaluated.fed.size, round(evaluated.fed.size * settings.resize))
        seen = readable(subject.images["all"], settings.shown, view)
        colours, share = coloured_patches(evaluated.network, evaluated.fed.of(seen), dtype=subject.dtype)
        columns = {"image": seen, "first 3 components": colours}
        return Result(
            [Figure("variance in 3 components", 100 * share)],
            pictures={"pca": lambda path: plot_pictures(columns, path)},
            notes=["Red, green and blue are the first, second and third component of the patches of all drawn images."],
        )
