"""A dress rehearsal of the ImageNet run on one small machine: every size is divided, but the counts."""
