"""Models as transformers has them: found, loaded, placed, cut, and run on packed rows.

Does not know teacher from student, nor any loss."""
