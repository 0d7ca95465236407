/* SPDX-License-Identifier: MIT */
/* What a process of a machine does to itself: signals, and whom it dies with. */
#include "py/base.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "py/tables.h"

static PyObject *kick_block(PyObject *module, PyObject *arg)
{
    unsigned signo;
    int block;
    sigset_t set;
    (void)module;
    if (!PyArg_ParseTuple(arg, "Ip", &signo, &block))
        return NULL;
    sigemptyset(&set);
    sigaddset(&set, (int)signo);
    pthread_sigmask(block ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL);
    Py_RETURN_NONE;
}

/* signal_fd(signals): block them here and read them from the descriptor instead. */
static PyObject *signal_fd(PyObject *module, PyObject *arg)
{
    sigset_t set;
    Py_ssize_t i;
    (void)module;
    sigemptyset(&set);
    PyObject *list = PySequence_Fast(arg, "signals");
    if (!list)
        return NULL;
    for (i = 0; i < PySequence_Fast_GET_SIZE(list); i++)
        sigaddset(&set, (int)PyLong_AsLong(PySequence_Fast_GET_ITEM(list, i)));
    Py_DECREF(list);
    if (PyErr_Occurred())
        return NULL;
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    int fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    return fd < 0 ? shi_os_error(errno, "signalfd") : PyLong_FromLong(fd);
}

/* die_with(parent): be killed when `parent`, which forked this process, ends. */
static PyObject *die_with(PyObject *module, PyObject *arg)
{
    long parent = PyLong_AsLong(arg);
    (void)module;
    if (PyErr_Occurred())
        return NULL;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
        return PyErr_SetFromErrno(PyExc_OSError);
    if (getppid() != (pid_t)parent)
        _exit(1); /* it ended before the request was in force */
    Py_RETURN_NONE;
}

PyMethodDef shi_process_functions[] = {
    { "signal_fd", signal_fd, METH_O, "signal_fd(signals) -> fd" },
    { "kick_block", kick_block, METH_VARARGS, "kick_block(signo, block)" },
    { "die_with", die_with, METH_O, "die_with(parent): end when the parent does" },
    { NULL, NULL, 0, NULL },
};
