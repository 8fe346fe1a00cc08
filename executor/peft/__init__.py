"""PEFT methods as torch modules, one file each, named as in spec/peft/."""
