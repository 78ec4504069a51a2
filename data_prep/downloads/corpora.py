"""The corpora whose pictures must be downloaded, by name."""

from data_prep.downloads import cc3m, cc12m, coyo, datacomp, laion

CORPORA = {module.CORPUS.name: module.CORPUS for module in (cc3m, cc12m, coyo, datacomp, laion)}
