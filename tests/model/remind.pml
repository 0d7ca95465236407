/* SPDX-License-Identifier: MIT */
/*
 * A CPU whose interpreter was asked to run a handler, and its timer that asks again.
 *
 * Modelled: one thread. It looks whether it was asked, and what it was asked for is taken; or it
 * is past that look and goes into a system call that nothing but a signal ends. A kick's handler,
 * an NMI's and the timer's come between any two steps (one at a time: they are atomic here, for
 * each blocks the others or comes after them), defer a handler for the interpreter, ask, and set
 * the timer. So does the end of a section with interrupts off, which is not atomic. Between two
 * tasks the thread is idle: there a kick is taken at once, an NMI's handler is the idle loop's to
 * run, and the timer is stopped before it looks.
 *
 * Rules, each removed by its switch:
 *   NO_TIMER         the interpreter is asked once
 *   STOP_FLAG_FIRST  the flag is taken back before the timer is stopped
 *   EXPIRED_ONCE     the timer asks, and is not set again while something waits
 *   ARM_ALWAYS       not a mutation: the timer is set anew by each who asks
 *   FLAG_AFTER_SET   not a mutation: an expiry between the two finds something that waits
 */
#ifndef KICKS
#define KICKS 3
#endif
byte sent;                      /* kicks and NMIs so far */
bool waits, asked;              /* deferred for the interpreter; Handlers[].tripped */
bool flag, set;                 /* self->reminding; the timer runs */
bool blocked, idle, off, happened; /* of the thread */

inline remind() {               /* shi_remind, inside a handler */
    if
#ifdef ARM_ALWAYS
    :: true -> flag = 1; set = 1
#else
    :: !flag -> flag = 1; set = 1
    :: else
#endif
    fi
}

active proctype Kick() {
end:
    do
    :: d_step { sent < KICKS && !idle -> sent++;
            if
            :: off -> happened = 1
            :: else -> waits = 1; asked = 1; remind(); blocked = 0
            fi }
    :: d_step { sent < KICKS -> sent++;     /* an NMI */
            waits = 1; asked = 1; remind(); blocked = 0 }
    od
}

active proctype Timer() {
end:
    do
    :: d_step { set -> set = 0;
            flag = 0;
            if
#ifndef NO_TIMER
            :: waits -> asked = 1; blocked = 0;
#ifndef EXPIRED_ONCE
                remind()
#endif
            :: else -> blocked = 0
#else
            :: true
#endif
            fi }
    od
}

inline look() {                 /* the interpreter, or the idle loop */
    d_step { asked -> asked = 0; waits = 0 }
}

active proctype Thread() {
    byte tasks;
    do
    :: tasks == 2 -> break
    :: else ->
        d_step { idle = 0; asked = 0; waits = 0 };  /* a task starts with nothing left behind */
        if
        :: look()               /* at a bytecode */
        :: true                 /* nothing asked, or past the look */
        fi;
        if
        :: off = 1;             /* a section with interrupts off */
            off = 0;
            if
            :: happened -> happened = 0; waits = 1; asked = 1;
#ifdef ARM_ALWAYS
                d_step { flag = 1; set = 1 }
#else
                if
                :: !flag ->
#ifdef FLAG_AFTER_SET
                    set = 1; flag = 1
#else
                    flag = 1; set = 1
#endif
                :: else
                fi
#endif
            :: else
            fi
        :: true
        fi;
        blocked = 1;            /* the system call: ended by a signal, or by what it waits for */
        if
        :: !blocked -> skip
        :: sent == KICKS && !waits && !happened -> blocked = 0
        fi;
        /* The call was interrupted: Python looks, and makes it again. */
        if
        :: asked -> look()
        :: else
        fi;
        if
        :: waits -> skip        /* the same task goes on */
        :: !waits ->
            idle = 1;
#ifdef STOP_FLAG_FIRST
            if :: flag -> flag = 0; set = 0 :: else fi;
#else
            if :: flag -> set = 0; flag = 0 :: else fi;
#endif
            d_step { asked = 0; waits = 0 };   /* the idle loop takes what there is */
            tasks++
        fi
    od
}
