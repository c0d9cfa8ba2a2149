// Which objects stand under which names in the `__dict__`s of a tree of torch modules: whether they are as they were.
// Only addresses are read and compared, so that a look at 400 modules with 8,000 entries takes 0.1 ms, and 0.3 right
// after a pass, which leaves none of them in the caches: a third of what the quickest walk in Python takes.
//
// The caller holds the interpreter's lock all the time. Nothing of Python is linked: its entry points are handed over,
// and none of them runs code of Python's or frees an object, so that borrowed references are enough.
#pragma once

#include "native.h"

namespace hfp {

typedef void Object;

struct Interpreter {
    int (*next)(Object *dict, intptr_t *position, Object **key, Object **value);  // PyDict_Next
    Object *(*item)(Object *dict, Object *key);                                   // PyDict_GetItemWithError, borrowed
    Object *(*dict_of)(Object *owner, void *unused);                              // PyObject_GenericGetDict
    Object *(*type_of)(Object *owner);                                            // PyObject_Type
    void (*release)(Object *owned);                                               // Py_DecRef
};

// The dicts of a module whose entries are looked at, beside those of its `__dict__`.
static const int64_t kInnerDicts = 5;

struct EntriesCall {
    Interpreter python;
    Object *none, *dict_types[2];  // what a dict may be, exactly
    Object *names[kInnerDicts];    // in `__dict__`; under the first are the modules below
    Object **modules;              // [max_modules], for those still to be looked at
    int64_t max_modules;
    Object **kept;                 // [max_kept]
    int64_t max_kept;
};

enum Look : int64_t { kCount = 0, kRecord = 1, kCompare = 2 };

struct Entries {
    const EntriesCall &call;
    Look look;
    int64_t num_modules, num_kept;
    bool is_same;

    void keep(Object *value) {
        const int64_t at = num_kept++;
        if (look == kCount) return;
        if (at >= call.max_kept) is_same = false;
        else if (look == kRecord) call.kept[at] = value;
        else is_same &= call.kept[at] == value;
    }

    // Every dict ends with its size, so that no entry can be taken for the next dict's.
    void keep_dict(Object *dict, bool holds_modules) {
        intptr_t position = 0, size = 0;
        Object *key, *value;
        for (; call.python.next(dict, &position, &key, &value); ++size) {
            keep(key), keep(value);
            if (!holds_modules || value == call.none) continue;
            fetch_module(value);
            if (num_modules < call.max_modules) call.modules[num_modules++] = value;
            else is_same = false;
        }
        keep((Object *)size);
    }

    Object *type_of(Object *value) {
        Object *type = call.python.type_of(value);
        call.python.release(type);  // `value` keeps it
        return type;
    }

    // Where a module leads to its `__dict__` lies at its begin or, from Python 3.11 on, right before it.
    static void fetch_module(Object *module) {
        __builtin_prefetch(module);
        __builtin_prefetch((char *)module - 3 * sizeof(Object *));
    }

    bool is_dict(Object *value) {
        const Object *type = type_of(value);
        return type == call.dict_types[0] || type == call.dict_types[1];
    }

    bool keep_module(Object *module) {
        Object *own = call.python.dict_of(module, nullptr);
        if (!own) return false;
        call.python.release(own);  // the module keeps it
        keep(type_of(module)), keep_dict(own, false);
        Object *dicts[kInnerDicts];
        for (int64_t i = 0; i < kInnerDicts; ++i) {
            dicts[i] = call.python.item(own, call.names[i]);
            __builtin_prefetch(dicts[i]);
        }
        for (int64_t i = 0; i < kInnerDicts; ++i) {
            if (!dicts[i] || !is_dict(dicts[i])) return false;
            keep_dict(dicts[i], i == 0);
        }
        return true;
    }
};

// How many addresses there are, -1 where they are not as kept, or something is no module.
static int64_t look_through(const EntriesCall &call, Object *root, Look look) {
    if (call.max_modules < 1 || call.max_kept < 0 || !call.modules || (look != kCount && !call.kept)) return -1;
    Entries entries = {call, look, 1, 0, true};
    call.modules[0] = root;
    for (int64_t i = 0; i < entries.num_modules && entries.is_same; ++i)
        if (!entries.keep_module(call.modules[i])) return -1;
    const bool is_whole = look == kCount || entries.num_kept == call.max_kept;
    return entries.is_same && is_whole ? entries.num_kept : -1;
}

}  // namespace hfp
