"""Models as transformers has them: found, loaded, placed, checked, and run on packed rows.

Does not know teacher from student, nor any loss."""
