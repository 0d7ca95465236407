/* SPDX-License-Identifier: MIT */
/* Interrupt controllers as Python describes and drives them. */
#ifndef SHI_PY_CHIP_H
#define SHI_PY_CHIP_H

#include "py/base.h"

/* Fill `chip` from the description that shmipi/irq/chips/base.py makes: 0, or -1. */
int shi_chip_from_python(PyObject *description, struct shi_chip *chip);
/* 0, or -1: ValueError. */
int shi_check_line(const Machine *machine, unsigned line);

#endif
